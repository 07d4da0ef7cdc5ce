// A panel of ours as a node's widget, in both of ComfyUI's canvases. A panel has an `element` and a `minHeight()`.

import { app } from '../../scripts/app.js'

/** Puts the panel below the node's widgets. It is not saved, and the wheel over it zooms, but over what scrolls. */
export function addPanel(node, name, panel) {
  const widget = node.addDOMWidget(name, name.toUpperCase(), panel.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => panel.minHeight() + 20,
    getValue: () => undefined
  })
  widget.serialize = false
  panel.element.addEventListener('wheel', zoomTheCanvas)
  return widget
}

/** Makes the node as high as its widgets need, never smaller. Nodes 2.0 do that by themselves. */
export function fit(node, panel) {
  if (panel) panel.element.style.minHeight = `${panel.minHeight()}px`
  if (window.LiteGraph?.vueNodesMode) return
  const [width, height] = node.computeSize()
  if (width > node.size[0] || height > node.size[1]) {
    node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])])
  }
  node.setDirtyCanvas?.(true, true)
}

function zoomTheCanvas(event) {
  if (window.LiteGraph?.vueNodesMode || event.target.closest('.film')) return
  event.preventDefault()
  app.canvas?.processMouseWheel(event)
}
