// A few lines about something on a node. They know nothing of ComfyUI.

import { LINE, PADDING, addStyle, make } from './panel.js'

const BORDERS = 2 // pixels, of both
const EDGES = 2 * PADDING + BORDERS

export class Facts {
  /** `resized()` is told of another height. */
  constructor({ resized }) {
    addStyle()
    this.resized = resized
    this.element = make('div', 'stylewright facts')
    this.words = make('div', 'words')
    this.element.append(this.words)
    this.show('')
    new ResizeObserver(() => this.arrange()).observe(this.words)
  }

  /** Shows lines of text; `failed`: as an error. Nothing is seen of no text. */
  show(text, failed = false) {
    const lines = text ? text.split('\n') : []
    this.words.replaceChildren(...lines.map((line, index) => make('div', failed ? 'failed' : index ? 'pale' : '', line)))
    this.element.style.display = lines.length ? '' : 'none'
    this.arrange()
  }

  arrange() {
    const height = this.minHeight()
    if (height !== this.height) this.resized((this.height = height))
  }

  /** Pixels: lines are measured where they are on the page, guessed where they are not. */
  minHeight() {
    const lines = this.words.childElementCount
    return lines ? (this.words.offsetHeight || lines * LINE) + EDGES : 0
  }
}
