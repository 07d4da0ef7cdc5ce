// The two charts of the trainer's panel as SVG, drawn at the size in pixels at which they are shown.
// Colours come from the classes in panel.js, so that every theme of ComfyUI fits.

const MARGIN = { left: 40, right: 14, top: 8, bottom: 18 }

/** The loss over the steps: what was reported, faint, and its moving average. `points`: [[step, loss], …]. */
export function lossCurve({ points, steps, width, height }) {
  const losses = points.map(([, loss]) => loss)
  const [low, high] = padded(quantile(losses, 0.01), quantile(losses, 0.99))
  const x = scale(0, Math.max(steps, 1), MARGIN.left, width - MARGIN.right)
  const y = scale(low, high, height - MARGIN.bottom, MARGIN.top)
  const place = ([step, loss]) => `${x(step).toFixed(1)},${y(clamp(loss, low, high)).toFixed(1)}`
  const columns = Math.max(1, Math.floor(width - MARGIN.left - MARGIN.right))
  return svg(width, height, [
    ...ticks(low, high, 4).map((value) => horizontal(y(value), width, number(value))),
    ...ticks(0, steps, Math.max(2, Math.floor(width / 90))).map((value) => below(x(value), width, height, value)),
    `<polyline class="raw" points="${extremes(points, columns).map(place).join(' ')}"/>`,
    `<polyline class="smooth" points="${thinned(smoothed(points), columns).map(place).join(' ')}"/>`,
    points.length === 1 ? `<circle class="dot" r="2" cx="${x(points[0][0])}" cy="${y(points[0][1])}"/>` : ''
  ])
}

/** The mean loss at each noise level, fainter where little was drawn. `bins`: [[low, high, loss, samples], …]. */
export function lossByLevel({ bins, window: styleWindow, width, height }) {
  const left = Math.min(bins[0][0], styleWindow === null ? Infinity : Math.floor(styleWindow) - 1)
  const right = Math.max(bins.at(-1)[1], styleWindow === null ? -Infinity : Math.ceil(styleWindow) + 1)
  const most = Math.max(...bins.map(([, , , samples]) => samples))
  const highest = Math.max(...bins.map(([, , loss]) => loss)) * 1.1 || 1
  const x = scale(left, right, MARGIN.left, width - MARGIN.right)
  const y = scale(0, highest, height - MARGIN.bottom, MARGIN.top)
  const bars = bins.map(([low, high, loss, samples]) => {
    const strength = (0.3 + 0.7 * Math.sqrt(samples / most)).toFixed(2)
    const box = `x="${x(low) + 1}" width="${Math.max(1, x(high) - x(low) - 2)}" y="${y(loss)}" height="${y(0) - y(loss)}"`
    const words = `log-SNR ${signed(low)} to ${signed(high)}: loss ${number(loss)}, ${samples} samples`
    return `<rect class="bar" rx="2" ${box} opacity="${strength}"><title>${words}</title></rect>`
  })
  return svg(width, height, [
    styleWindow === null ? '' : shaded(x(left), x(styleWindow), height),
    ...ticks(0, highest, 3).map((value) => horizontal(y(value), width, number(value))),
    ...bars,
    ...ticks(left, right, Math.max(2, Math.floor(width / 40))).map((value) => below(x(value), width, height, signed(value)))
  ])
}

/** Losses as an exponential moving average over about a tenth of the points, unbiased at the start. */
export function smoothed(points) {
  const keep = 1 - 1 / Math.max(1, points.length / 10)
  let sum = 0
  let weight = 0
  return points.map(([step, loss]) => {
    sum = keep * sum + loss
    weight = keep * weight + 1
    return [step, sum / weight]
  })
}

/** Round values from `low` to `high`, about `count` of them. */
export function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count)
  if (!(rough > 0)) return []
  const power = 10 ** Math.floor(Math.log10(rough))
  const gap = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough)
  const first = Math.ceil(low / gap - 1e-9)
  const last = Math.floor(high / gap + 1e-9)
  return Array.from({ length: last - first + 1 }, (_, index) => Number(((first + index) * gap).toPrecision(12)))
}

/** A loss in as few digits as tell it apart. */
export function number(value) {
  if (value === 0) return '0'
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? String(Number(value.toPrecision(3))) : value.toExponential(1).replace('.0e', 'e')
}

const clamp = (value, low, high) => Math.min(high, Math.max(low, value))
const scale = (from, to, first, last) => (value) => first + ((value - from) / (to - from || 1)) * (last - first)
const signed = (value) => String(value).replace('-', '\u2212')

function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b)
  return sorted[Math.round(share * (sorted.length - 1))]
}

function padded(low, high) {
  const room = (high - low) * 0.1 || Math.abs(high) * 0.1 || 1
  return [low > 0 ? Math.max(0, low - room) : low - room, high + room]
}

/** Consecutive points in at most `count` groups. */
function groups(points, count) {
  const size = Math.ceil(points.length / count)
  return Array.from({ length: Math.ceil(points.length / size) }, (_, index) =>
    points.slice(index * size, (index + 1) * size)
  )
}

/** The smallest and the largest of each group: what thousands of points look like in a few hundred columns. */
function extremes(points, count) {
  if (points.length <= 2 * count) return points
  return groups(points, count).flatMap((group) => {
    const sorted = [...group].sort((a, b) => a[1] - b[1])
    return [sorted[0], sorted.at(-1)].sort((a, b) => a[0] - b[0])
  })
}

function thinned(points, count) {
  return points.length <= 2 * count ? points : groups(points, count).map((group) => group.at(-1))
}

function horizontal(y, width, label) {
  const line = `<line class="grid" x1="${MARGIN.left}" x2="${width - MARGIN.right}" y1="${y}" y2="${y}"/>`
  return `${line}<text class="tick" x="${MARGIN.left - 5}" y="${y + 3}" text-anchor="end">${label}</text>`
}

function below(x, width, height, label) {
  const middle = Math.min(x, width - 3 * String(label).length) // all of it in the picture
  return `<text class="tick" x="${middle}" y="${height - 5}" text-anchor="middle">${label}</text>`
}

function shaded(from, to, height) {
  const box = `x="${from}" width="${Math.max(0, to - from)}" y="0" height="${height - MARGIN.bottom}"`
  return `<rect class="window" ${box}/><text class="tick accent" x="${from + 4}" y="11">style window</text>`
}

function svg(width, height, parts) {
  return `<svg width="${width}" height="${height}" viewBox="0 0 ${width} ${height}">${parts.join('')}</svg>`
}
