// One panel: a title, what to look for, a legend with the numbers under the pointer, and a uPlot chart.
import uPlot from "./vendor/uPlot.esm.js";
import { number, put, text } from "./dom.js";

const HEIGHT = 170;
const SMOOTHED = 60;  // points beyond which a line is a running mean, over a fiftieth of them
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export class Chart {
  // panel: { title, unit, say, x, data(store) -> { x, series: [{ label, y, low?, high?, points?, fill? }] }, range? }
  constructor(panel, store, parent) {
    this.panel = panel;
    this.store = store;
    this.shape = "";
    this.visible = false;
    const figure = this.figure = parent.appendChild(document.createElement("figure"));
    figure.id = `panel-${panel.name}`;
    const title = figure.appendChild(text("h3", panel.title));
    title.append(" ", text("span", panel.unit, "unit"));
    figure.append(text("p", panel.say, "say"));
    this.legend = figure.appendChild(text("div", "", "legend"));
    this.plot = figure.appendChild(text("div", "", "plot"));
    this.plot.setAttribute("role", "img");
    this.plot.setAttribute("aria-label", `${panel.title}, ${panel.unit}`);
    new ResizeObserver(() => this.chart?.setSize({ width: this.plot.clientWidth, height: HEIGHT })).observe(this.plot);
    new IntersectionObserver(([entry]) => {
      this.visible = entry.isIntersecting;
      if (this.visible) this.draw();
    }).observe(figure);
  }

  draw() {
    if (document.hidden || !(this.visible || this.figure.hidden)) return;
    const { x, series } = this.panel.data(this.store);
    const known = x.length > 0 && series.length > 0;
    this.figure.hidden = Boolean(this.panel.optional) && !known;
    if (!this.visible) return;  // what was hidden is seen from here on, and then drawn
    for (const each of series) {
      each.mean = x.length > SMOOTHED && !each.low && !each.points ? runningMean(each.y, Math.round(x.length / 50)) : null;
      each.faint = each.mean && series.length <= 2;
    }
    const shape = series.map((each) => `${each.label}${each.low ? "~" : ""}${each.faint ? "-" : ""}`).join("|");
    if (shape !== this.shape || !known) this.clear(known);
    this.series = series;
    if (known) {
      const data = [x, ...series.flatMap((each) =>
        [each.mean ?? each.y, ...(each.faint ? [each.y] : []), ...(each.low ? [each.low, each.high] : [])])];
      if (this.chart) this.chart.setData(data);
      else {
        this.plot.replaceChildren();
        this.chart = new uPlot(this.options(series), data, this.plot);
      }
      this.shape = shape;
    }
    this.say(this.chart?.cursor.idx ?? null);
  }

  // Made anew at the next drawing: with other colours, or other series.
  clear(known = true) {
    this.chart?.destroy();
    this.chart = null;
    this.shape = "";
    this.plot.replaceChildren(...(known ? [] : [text("p", "nothing on record yet", "empty")]));
  }

  say(index) {
    const x = this.chart?.data[0] ?? [];
    const series = this.series ?? [];
    const parts = series.map((each, place) => {
      const at = index ?? lastKnown(each.y);
      const part = document.createElement("span");
      const value = this.panel.bins && index === null ? "" : at === null ? "-" : number(each.y[at]);
      const mark = part.appendChild(document.createElement("i"));
      mark.style.background = `var(--c${each.colour ?? place})`;
      const band = each.low && at !== null ? ` (${number(each.low[at])} to ${number(each.high[at])})` : "";
      const old = index === null && !this.panel.bins && at !== null && at < x.length - 1 && series.length > 1 ? ` (step ${number(x[at])})` : "";
      part.append(`${each.label ? `${each.label} ` : ""}${value}${band}${old}`);
      return part;
    });
    const last = index ?? x.length - 1;
    if (last >= 0 && x.length) parts.push(text("span", this.place(index, x[last]), "at"));
    put(this.legend, parts);
  }

  // Of bins only the one under the pointer has a meaning; else it is said of which step they are.
  place(index, x) {
    if (!this.panel.bins) return `at step ${number(x)}`;
    return index === null ? `step ${this.store.histograms.step}` : `log-ratio ${this.panel.bins(this.store, index)}`;
  }

  options(series) {
    const grid = { stroke: style("--grid"), width: 1 };
    const axis = { stroke: style("--soft"), grid, ticks: grid, font: "11px system-ui", size: 50, gap: 3 };
    const drawn = [{}], bands = [];
    series.forEach((each, place) => {
      const stroke = style(`--c${each.colour ?? place}`);
      const dash = [[], [6, 3], [2, 2], [8, 3, 2, 3]][place % 4];
      drawn.push({ stroke, width: 1.8, dash, spanGaps: true, points: { show: Boolean(each.points), size: 5 } });
      if (each.faint) drawn.push({ stroke: `${stroke}55`, width: 1, spanGaps: true, points: { show: false } });
      if (each.low) {
        const edge = { stroke: "transparent", width: 0, spanGaps: true, points: { show: false } };
        drawn.push(edge, edge);
        bands.push({ series: [drawn.length - 1, drawn.length - 2], fill: `${stroke}33` });
      }
    });
    return {
      width: this.plot.clientWidth, height: HEIGHT, series: drawn, bands, legend: { show: false },
      cursor: { y: false, sync: { key: this.panel.x ?? "step" }, drag: { x: true, y: false } },
      scales: { x: { time: false, distr: this.panel.distr ?? 1 }, y: this.panel.range ? { range: this.panel.range } : {} },
      axes: [{ ...axis, size: 26, ...(this.panel.bins ? edgeTicks(this.store) : { values: ticks }) }, { ...axis, values: ticks }],
      hooks: { setCursor: [(chart) => this.say(chart.cursor.idx ?? null)] },
    };
  }
}

// At powers of ten, where the edges of bins are: edge k lies between bins k and k + 1.
function edgeTicks(store) {
  const edges = store.histograms?.edges ?? [];
  const at = [...edges.keys()].filter((index) => Math.abs(edges[index]) > 0.005 && Number.isInteger(Math.log10(Math.abs(edges[index]))));
  return { splits: () => at.map((index) => index + 0.5), values: () => at.map((index) => String(edges[index])) };
}

// As many digits as tell two neighbours apart.
function ticks(_, splits, __, ___, step) {
  let digits = 0;
  while (digits < 5 && Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) > 1e-6) digits++;
  return splits.map((each) => (Math.abs(each) >= 1e4 || digits > 4 ? number(each, 2) : each.toFixed(digits)));
}

// Around each point, over `width` of those that are known.
function runningMean(values, width) {
  const sums = new Float64Array(values.length + 1), counts = new Int32Array(values.length + 1);
  values.forEach((value, index) => {
    sums[index + 1] = sums[index] + (value ?? 0);
    counts[index + 1] = counts[index] + (value === null ? 0 : 1);
  });
  return values.map((_, index) => {
    const from = Math.max(0, index - width), to = Math.min(values.length, index + width + 1);
    const count = counts[to] - counts[from];
    return count ? (sums[to] - sums[from]) / count : null;
  });
}

function lastKnown(values) {
  for (let index = values.length - 1; index >= 0; index--) if (values[index] !== null) return index;
  return null;
}
