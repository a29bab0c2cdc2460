// Small things that every part of the page makes. Text is only ever put in as text.

export function text(tag, content, name = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.textContent = content;
  return element;
}

export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e6) return `${(value / 1e6).toFixed(1)}M`;
  if (size >= 1e4) return `${(value / 1e3).toFixed(1)}k`;
  if (Number.isInteger(value)) return String(value);
  if (size < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(digits)));
}

export function seconds(value) {
  if (value < 100) return `${value.toFixed(0)} s`;
  return value < 6000 ? `${(value / 60).toFixed(0)} min` : `${(value / 3600).toFixed(1)} h`;
}

// Children in place of those that are there. One that is like the one in its place is left out: nothing is laid out again.
export function put(parent, children) {
  children.forEach((child, index) => {
    const there = parent.childNodes[index];
    if (!there) parent.append(child);
    else if (!there.isEqualNode(child)) there.replaceWith(child);
  });
  while (parent.childNodes.length > children.length) parent.lastChild.remove();
}

// Rows of a table body: [[cell, ...], ...] with a cell a string, or { say, name }.
export function rows(body, content, nameOf = () => "") {
  put(body, content.map((cells, index) => {
    const row = document.createElement("tr");
    row.className = nameOf(index);
    row.append(...cells.map((cell) => (typeof cell === "object" ? text("td", cell.say, cell.name) : text("td", cell))));
    return row;
  }));
}
