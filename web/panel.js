// The panel on a trainer's node: how far it is, the loss, and the sample pictures. It knows nothing of ComfyUI.

import { lossByLevel, lossCurve, number } from './charts.js'

// Heights in pixels. The curve takes what else there is.
export const LINE = 16
const GAP = 7
export const PADDING = 9
const CURVE = 136
const LEVELS = 112
const THUMB = 104 // height of a sample picture
const MOST_ROWS = 4 // of sample pictures before they scroll

const STYLE = `
.stylewright { --accent: #3d8fd1; --warm: #c9793f; color: var(--input-text, #ddd); font: 12px/${LINE}px system-ui, sans-serif;
  display: flex; flex-direction: column; gap: ${GAP}px; padding: ${PADDING}px; box-sizing: border-box; overflow: hidden;
  background: var(--component-node-widget-background, var(--comfy-input-bg, #222)); border: 1px solid var(--border-color, #4e4e4e); border-radius: 8px;
  user-select: none; font-variant-numeric: tabular-nums }
.stylewright > * { flex: none } .stylewright [hidden] { display: none } .stylewright .curve { flex: 1 0 ${CURVE}px }
.stylewright .pale, .stylewright figcaption { color: var(--descrip-text, #999) }
.stylewright .head { display: flex; gap: 8px; justify-content: space-between; white-space: nowrap }
.stylewright .head b { font-weight: 600 } .stylewright .head .text { overflow: hidden; text-overflow: ellipsis; flex: 1 }
.stylewright .bar-outer { height: 4px; border-radius: 2px; background: var(--border-color, #4e4e4e); overflow: hidden }
.stylewright .bar-inner { height: 100%; background: var(--accent); transition: width .3s }
.stylewright .figures { display: flex; flex-wrap: wrap; gap: 2px 14px }
.stylewright .figures b { font-weight: 600; margin-left: 4px; color: var(--input-text, #ddd) }
.stylewright .note, .stylewright .stopped { color: var(--warm) } .stylewright .failed { color: var(--error-text, #ff4444) }
.stylewright .words { overflow-wrap: anywhere; user-select: text }
.stylewright[data-phase=failed] .head b { color: var(--error-text, #ff4444) }
.stylewright[data-phase=finished] .bar-inner { background: #4fa36a } .stylewright[data-phase=stopped] .bar-inner { background: var(--warm) }
.stylewright figure { margin: 0; position: relative; min-height: 0; display: flex; flex-direction: column }
.stylewright figure > div { flex: 1; min-height: 0; overflow: hidden } .stylewright svg { display: block }
.stylewright .levels { height: ${LEVELS}px }
.stylewright .grid { stroke: var(--border-color, #4e4e4e); stroke-width: .5 }
.stylewright .tick { fill: var(--descrip-text, #999); font-size: 10px } .stylewright .tick.accent { fill: var(--warm) }
.stylewright .raw { fill: none; stroke: var(--accent); opacity: .32; stroke-linejoin: round }
.stylewright .smooth { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round }
.stylewright .dot, .stylewright .bar { fill: var(--accent) } .stylewright .window { fill: var(--warm); opacity: .13 }
.stylewright .film { overflow: auto; display: grid; grid-auto-flow: column; justify-content: start; gap: 4px; scrollbar-width: thin }
.stylewright .film > div { display: flex; flex-direction: column; gap: 4px; text-align: center }
.stylewright .film > div:first-child { position: sticky; left: 0; background: var(--component-node-widget-background, var(--comfy-input-bg, #222)); z-index: 1; padding-right: 2px }
.stylewright .film img { height: ${THUMB}px; border-radius: 4px; display: block; cursor: zoom-in }
`

export class Panel {
  /** `pictureUrl(subfolder, name, stamp)` is where a sample picture is found; `resized()` is told of another height. */
  constructor({ pictureUrl, resized }) {
    addStyle()
    this.pictureUrl = pictureUrl
    this.resized = resized
    this.run = null
    this.element = make('div', 'stylewright')
    this.head = make('div', 'head')
    this.progress = make('div', 'bar-outer')
    this.progress.append(make('div', 'bar-inner'))
    this.figures = make('div', 'figures pale')
    this.words = make('div', 'words pale')
    this.curve = chart('curve', 'loss')
    this.levels = chart('levels', 'loss by noise level (log-SNR: noise on the left)')
    this.film = make('div', 'film')
    this.element.append(this.head, this.progress, this.figures, this.words, this.curve, this.levels, this.film)
    const observer = new ResizeObserver(() => this.run && this.arrange())
    for (const part of [this.element, this.words, this.figures]) observer.observe(part)
  }

  /** Shows a run: what the server says of it, with all points so far. */
  show(run) {
    const another = this.run?.pictures?.subfolder !== run.pictures?.subfolder
    this.run = run
    this.element.dataset.phase = run.phase
    this.showWords()
    if (another) this.film.replaceChildren()
    this.showPictures()
    this.arrange()
  }

  /** Says how high the panel has to be, where that has changed, and draws the charts at the size that they have. */
  arrange() {
    const height = this.minHeight()
    if (height !== this.height) this.resized((this.height = height))
    this.drawCharts()
  }

  /** Pixels that the panel needs. Lines of words are measured where they are on the page, guessed where they are not. */
  minHeight() {
    const { run } = this
    if (!run) return 0
    const rows = Math.min(MOST_ROWS, run.pictures?.prompts?.length ?? 0)
    const parts = [
      LINE,
      4,
      this.figures.childElementCount ? this.figures.offsetHeight || 2 * LINE : 0,
      this.words.childElementCount ? this.words.offsetHeight || this.words.childElementCount * LINE : 0,
      run.points.length ? CURVE : 0,
      run.bins.length ? LEVELS : 0,
      run.pictures?.steps?.length ? filmHeight(rows) : 0
    ].filter((part) => part > 0)
    return parts.reduce((sum, part) => sum + part + GAP, 2 * PADDING - GAP + 2)
  }

  showWords() {
    const { phase, text, step, steps, left, loss, seconds, learning_rate: rate, peak_bytes: peak, routing } = this.run
    const running = phase === 'training' || phase === 'drawing'
    const title = make('b', '', phase[0].toUpperCase() + phase.slice(1))
    const ended = ['finished', 'stopped', 'failed'].includes(phase)
    const what = ended || !text ? (step || running ? `step ${step} of ${steps}` : '') : text
    const rest = running && left !== undefined ? `${duration(left)} left` : phase === 'finished' ? duration(seconds) : ''
    const words = make('span', 'text pale', what)
    words.title = what
    this.head.replaceChildren(title, words, make('span', '', rest))
    this.progress.firstChild.style.width = `${(100 * step) / Math.max(1, steps)}%`
    const figures = { loss: loss === undefined ? '' : number(loss) }
    if (step > 0 && seconds !== undefined) figures['time per step'] = `${number(seconds / step)} s`
    if (rate !== undefined) figures['learning rate'] = number(rate)
    if (peak) figures['peak of ComfyUI'] = `${(peak / 2 ** 30).toFixed(1)} GiB`
    if (routing) figures['most used branch'] = `${Math.round(100 * routing.largest)} %` // mean over the layers
    if (routing?.one_sided) figures['one-sided layers'] = number(routing.one_sided)
    this.figures.replaceChildren(...(loss === undefined ? [] : Object.entries(figures).map(figure)))
    this.words.replaceChildren(
      ...(ended ? [make('div', phase, text)] : []),
      ...(this.run.plan ? [make('div', '', this.run.plan)] : []),
      ...this.run.notes.map((note) => make('div', 'note', note))
    )
    for (const part of [this.figures, this.words]) part.hidden = !part.childElementCount
  }

  drawCharts() {
    const { points, bins, steps, window: styleWindow } = this.run ?? { points: [], bins: [] }
    this.curve.hidden = !points.length
    this.levels.hidden = !bins.length
    if (points.length) draw(this.curve, (size) => lossCurve({ points, steps, ...size }))
    if (bins.length) draw(this.levels, (size) => lossByLevel({ bins, window: styleWindow, ...size }))
  }

  /** Adds what is new: pictures that are shown already stay as they are. The newest come into sight. */
  showPictures() {
    const { subfolder, prompts = [], steps = [] } = this.run.pictures ?? {}
    this.film.hidden = !steps.length
    const shown = new Map([...this.film.children].map((column) => [column.dataset.key, column]))
    const columns = steps.map(([step, stamp, names]) => {
      const key = `${step}-${stamp}`
      return shown.get(key) ?? this.column(key, step, prompts, names.map((name) => this.pictureUrl(subfolder, name, stamp)))
    })
    const news = columns.some((column) => !column.isConnected || column.parentElement !== this.film)
    if (!news && columns.length === this.film.children.length) return
    this.film.replaceChildren(...columns)
    this.film.style.height = `${filmHeight(Math.min(MOST_ROWS, prompts.length))}px`
    requestAnimationFrame(() => (this.film.scrollLeft = this.film.scrollWidth))
  }

  column(key, step, prompts, urls) {
    const column = make('div', '', '')
    column.dataset.key = key
    const images = urls.map((url, index) => {
      const image = make('img')
      Object.assign(image, { src: url, title: `${prompts[index]} (step ${step})`, draggable: false })
      image.addEventListener('click', () => window.open(url, '_blank'))
      image.addEventListener('load', () => (this.film.scrollLeft = this.film.scrollWidth), { once: true })
      return image
    })
    column.append(make('div', 'pale', step === 0 ? (this.run.pictures.first ?? 'before') : `step ${step}`), ...images)
    return column
  }
}

/** "2:05" for 125 seconds, with hours where there are any. */
export function duration(seconds) {
  const whole = Math.round(seconds ?? 0)
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60]
  const pad = (value) => String(value).padStart(2, '0')
  return hours ? `${hours}:${pad(minutes)}:${pad(rest)}` : `${minutes}:${pad(rest)}`
}

export function addStyle() {
  if (document.getElementById('stylewright-panel')) return
  const style = make('style', '', STYLE)
  style.id = 'stylewright-panel'
  document.head.append(style)
}

export function make(tag, className = '', text = '') {
  const element = document.createElement(tag)
  element.className = className
  element.textContent = text
  return element
}

function chart(className, title) {
  const figure = make('figure', className)
  figure.append(make('figcaption', '', title), make('div'))
  figure.hidden = true
  return figure
}

/** Of rows of pictures under their labels, with room for a scroll bar. */
const filmHeight = (rows) => LINE + rows * (THUMB + 4) + 12

function figure([name, value]) {
  const span = make('span', '', name)
  span.append(make('b', '', value))
  return span
}

/** Replaces a chart's picture by one of its present size. */
function draw(figure, picture) {
  const { clientWidth: width, clientHeight: height } = figure.lastChild
  if (width > 80 && height > 40) figure.lastChild.innerHTML = picture({ width, height })
}
