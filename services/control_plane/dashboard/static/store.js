// The run as this tab knows it: the history, and what has come since. Points are in the order of their steps; every
// figure is a column beside `x`, null where there is none.

export class Table {
  constructor() { this.generation = -1; this.x = []; this.columns = {}; }

  load({ generation = 0, x, columns }) {
    this.generation = generation;
    this.x = x;
    this.columns = columns;
  }

  // Points from an index on, the first of them perhaps one that has grown. False: they do not fit, load everything.
  extend({ generation, from, x, columns }) {
    if (generation !== this.generation || from > this.x.length) return false;
    put(this.x, from, x);
    for (const name in columns) {
      this.columns[name] ??= new Array(from).fill(null);
      put(this.columns[name], from, columns[name]);
    }
    for (const name in this.columns) {
      const column = this.columns[name];
      column.length = Math.min(column.length, this.x.length);
      while (column.length < this.x.length) column.push(null);
    }
    return true;
  }

  named(prefix) { return Object.keys(this.columns).filter((name) => name.startsWith(prefix)); }

  // The last figure that there is.
  last(name) {
    const column = this.columns[name] ?? [];
    for (let index = column.length - 1; index >= 0; index--) if (column[index] !== null) return column[index];
    return null;
  }
}

function put(target, from, values) {
  target.length = from;
  for (const value of values) target.push(value);
}

export class Store {
  constructor() {
    this.steps = new Table();
    this.evaluations = new Table();
    this.histograms = null;
    this.groups = [];
    this.now = null;
  }

  load(history) {
    this.steps.load(history.steps);
    this.evaluations.load(history.evaluations);
    this.histograms = history.histograms;
    this.groups = history.groups;
  }

  // Returns false when something was missed.
  take(news) {
    this.now = news.now;
    if (news.evaluations) this.evaluations.load(news.evaluations);
    if (news.histograms) this.histograms = news.histograms;
    if (news.groups) this.groups = news.groups;
    return !news.steps || this.steps.extend(news.steps);
  }
}
