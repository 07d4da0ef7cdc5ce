// Shows on the nodes that take an adapter's file what the file is, as soon as it is picked (nodes/bridge/outlines.py).

import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'
import { Facts } from './facts.js'
import { addPanel, fit } from './widget.js'

const NODES = ['StyleLoRALoader', 'StyleLoRAResize']
const WIDGET = 'stylewright_adapter'
const FILE = 'lora_name'
const NOTHING = { text: '', failed: false }

const facts = new WeakMap() // by node of the page: what shows its file, and the widget around it

/** Asks what the node's file is, and shows the answer if it is still the node's file then. */
async function look(node) {
  const name = fileOf(node)
  const { text, failed } = name ? await ask(name) : NOTHING
  if (fileOf(node) !== name || (!text && !facts.has(node))) return // until there is something to show it looks as ever
  if (!facts.has(node)) {
    const panel = new Facts({ resized: () => facts.has(node) && fit(node, panel) })
    facts.set(node, { panel, widget: addPanel(node, WIDGET, panel) })
  }
  const { panel, widget } = facts.get(node)
  widget.hidden = !text
  panel.show(text, failed)
}

/** The file that the node will read; '' where it reads none, or another node says which. */
function fileOf(node) {
  const linked = node.inputs?.some((input) => input.widget?.name === FILE && input.link != null)
  const { value } = node.widgets?.find((widget) => widget.name === FILE) ?? {}
  return linked || typeof value !== 'string' ? '' : value
}

async function ask(name) {
  try {
    const answer = await api.fetchApi(`/stylewright/adapter?${new URLSearchParams({ name })}`)
    return answer.ok ? await answer.json() : NOTHING
  } catch (error) {
    console.warn('Stylewright: it is not known what the adapter is', error)
    return NOTHING
  }
}

function lookAll(graph = app.rootGraph ?? app.graph) {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    if (node.subgraph) lookAll(node.subgraph)
    if (NODES.includes(node.comfyClass)) look(node)
  }
}

/** Calls `then` after what the object's method does. */
function after(object, method, then) {
  const before = object[method]
  object[method] = function (...values) {
    const result = before?.apply(this, values)
    then()
    return result
  }
}

app.registerExtension({
  name: 'stylewright.adapters',

  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return
    const widget = node.widgets?.find(({ name }) => name === FILE)
    if (widget) after(widget, 'callback', () => look(node))
    after(node, 'onConnectionsChange', () => look(node))
  },

  afterConfigureGraph: () => lookAll()
})
