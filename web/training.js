// Shows on the nodes that train how their training goes: the server's messages find their node, and its panel.
//
// What the server says of a run (nodes/bridge/board.py) comes over the websocket as it grows, from a route when a page
// is opened in the middle of it, and with the node's output at the end and from ComfyUI's history.

import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'
import { Panel } from './panel.js'
import { addPanel, fit } from './widget.js'

const NODES = ['StyleFriendlySNRTrainer', 'PGSBDistiller']
const WIDGET = 'stylewright_training'
const OUTPUT = 'stylewright_training'

const runs = new Map() // by workflow and node: the whole state of the last run
const panels = new WeakMap() // by node of the page

const keyOf = (run) => `${run.workflow ?? ''} ${run.node}`
const rootGraph = () => app.rootGraph ?? app.graph

/** Takes in a message with what is new, or the whole of a run. False where something before it was missed. */
function merge(message) {
  const known = runs.get(keyOf(message))
  const last = known?.points.at(-1)?.[0] ?? 0
  if (message.previous === 0) {
    runs.set(keyOf(message), message)
    return true
  }
  if (message.previous !== last) return false
  runs.set(keyOf(message), { ...message, points: [...known.points, ...message.points] })
  return true
}

let fetching = null

/** Asks the server for all runs that it knows of. */
function fetchRuns() {
  fetching ??= api
    .fetchApi('/stylewright/runs')
    .then((answer) => (answer.ok ? answer.json() : []))
    .then((all) => all.forEach((run) => merge(run)))
    .catch((error) => console.warn('Stylewright: the runs so far are not known', error))
    .finally(() => (fetching = null))
  return fetching
}

/** The node with the id "12", or "12:3" for node 3 in the subgraph that node 12 stands for. */
function nodeAt(id) {
  let graph = rootGraph()
  let node = null
  for (const part of id.split(':')) {
    node = graph?.getNodeById(Number(part)) ?? null
    graph = node?.subgraph
  }
  return NODES.includes(node?.type) || NODES.includes(node?.comfyClass) ? node : null
}

function show(run) {
  const here = run.workflow === null || run.workflow === rootGraph()?.id
  const node = here ? nodeAt(run.node) : null
  if (node) panelOf(node).show(run)
}

const showAll = () => runs.forEach(show)

/** The node's panel, which it gets when there is something to show: until then it looks as ever. */
function panelOf(node) {
  if (!panels.has(node)) {
    const panel = new Panel({ pictureUrl, resized: () => fit(node, panels.get(node)) })
    addPanel(node, WIDGET, panel)
    panels.set(node, panel)
  }
  return panels.get(node)
}

function pictureUrl(subfolder, name, stamp) {
  const query = new URLSearchParams({ filename: name, subfolder, type: 'output', t: stamp })
  return api.apiURL(`/view?${query}`)
}

/** What the last execution left on the trainers of a graph: ComfyUI's history brings it back. */
function showOutputs(graph = rootGraph(), inside = '') {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    if (node.subgraph) showOutputs(node.subgraph, `${node.subgraph.id}:`)
    const [run] = app.nodeOutputs?.[`${inside}${node.id}`]?.[OUTPUT] ?? []
    if (NODES.includes(node.type) && run && !panels.has(node)) panelOf(node).show(run)
  }
}

app.registerExtension({
  name: 'stylewright.training',

  setup() {
    api.addEventListener('stylewright.training', async ({ detail }) => {
      if (!merge(detail)) await fetchRuns()
      const run = runs.get(keyOf(detail))
      if (run) show(run)
    })
    fetchRuns().then(showAll)
  },

  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.apply(this, arguments)
      const [run] = output?.[OUTPUT] ?? []
      if (run) panelOf(this).show(run)
    }
  },

  /** A graph was loaded: by a start of the page, a change of the tab, an undo, or from the history. */
  afterConfigureGraph() {
    fetchRuns().then(showAll).then(() => showOutputs())
  }
})
