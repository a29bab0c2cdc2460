// The trajectory browser: a list of groups, and one of them token by token.
import { number, text } from "./dom.js";

const of = (id) => document.getElementById(id);
const CLOSED_BELOW = 0.5;
const MOST_TOKENS = 20000;  // drawn at once

// Edges, and a style and words between each two: those of `sapo show`.
const WEIGHT = { edges: [0.2, CLOSED_BELOW, 0.9], styles: ["shut", "narrow", "half", ""],
  words: ["below 0.2", "0.2 to 0.5", "0.5 to 0.9", "above"] };
const SCALES = {
  weight: WEIGHT,
  ratio: { edges: [0.5, 0.8, 1.25, 2], styles: ["low", "lower", "", "higher", "high"],
    words: ["below 0.5", "0.5 to 0.8", "0.8 to 1.25", "1.25 to 2", "above"] },
  advantage: { edges: [-1, -1e-12, 1e-12, 1], styles: ["low", "lower", "", "higher", "high"],
    words: ["below -1", "-1 to 0", "0", "0 to 1", "above"] },
  logprob: { edges: [-4.6, -2.3, -0.7, -0.1], styles: ["shut", "narrow", "half", "lower", ""],
    words: ["below 1 %", "1 to 10 %", "10 to 50 %", "50 to 90 %", "above"] },
};
const COLUMN = { weight: "gate_weight", ratio: "ratio", advantage: "advantage", logprob: "behaviour_logprob", version: "version" };

let chosen = "", shown = null, by = "weight";

export function browser(store) {
  let said = "";
  return () => {
    const key = `${store.groups.length} ${store.groups[0]?.entry}`;
    if (key === said) return;
    said = key;
    list(store.groups);
  };
}

// Rows that are there already stay as they are, with the focus that one may have.
function list(groups) {
  const body = of("group-rows");
  if (!groups.length) return body.replaceChildren(empty());
  const entries = new Set(groups.map((group) => group.entry)), there = new Map();
  for (const row of [...body.children]) {
    if (entries.has(row.dataset.entry)) there.set(row.dataset.entry, row);
    else row.remove();
  }
  let next = body.firstElementChild;
  for (const group of groups) {
    const row = there.get(group.entry) ?? rowOf(group);
    if (row === next) next = next.nextElementSibling;
    else body.insertBefore(row, next);
  }
}

function rowOf(group) {
  const row = document.createElement("tr");
  row.dataset.entry = group.entry;
  row.setAttribute("aria-selected", String(group.entry === chosen));
  const button = text("button", group.entry);
  button.title = group.prompt;
  row.addEventListener("click", () => choose(group.entry));  // the button's clicks, too
  const name = document.createElement("td");
  name.append(button);
  row.append(text("td", String(group.step), "n"), name, taskOf(group), dots(group.rewards), text("td", number(group.weight_mean), "n"));
  return row;
}

function taskOf(group) {
  const cell = text("td", group.task, "task");
  cell.title = group.task;
  return cell;
}

function empty() {
  const row = document.createElement("tr");
  const cell = row.appendChild(text("td", "none yet: the learner hands one over with its first step that has signal"));
  cell.colSpan = 5;
  return row;
}

// One for each response: full, half, or none of the largest reward there is.
function dots(rewards) {
  const cell = document.createElement("td"), mean = rewards.reduce((sum, each) => sum + each, 0) / rewards.length;
  const holder = cell.appendChild(text("span", "", "dots"));
  const most = Math.max(...rewards, 1e-9);
  for (const reward of rewards.slice(0, 32)) holder.append(text("i", "", reward >= most * 0.999 ? "full" : reward > 0 ? "part" : ""));
  holder.setAttribute("role", "img");
  holder.setAttribute("aria-label", `rewards ${rewards.map((each) => number(each)).join(", ")}`);
  cell.title = `mean reward ${number(mean)}`;
  cell.append(` ${number(mean)}`);
  return cell;
}

async function choose(entry) {
  chosen = entry;
  for (const row of of("group-rows").children) row.setAttribute("aria-selected", String(row.dataset.entry === entry));
  const answer = await fetch(`v1/groups/${encodeURIComponent(entry)}`).catch(() => null);
  if (entry !== chosen) return;
  if (!answer?.ok) {
    const why = answer ? (await answer.json()).error?.what ?? `HTTP ${answer.status}` : "no connection";
    return of("group").replaceChildren(text("p", `Group ${entry}: ${why}`, "say"));
  }
  shown = await answer.json();
  draw();
  if (matchMedia("(max-width: 800px)").matches) of("group").scrollIntoView();  // it is below the list
}

function draw() {
  const group = shown, holder = of("group");
  const name = group.weight === "gate" ? "gate weight" : "coefficient of the plain policy gradient (this objective has no gate)";
  const head = text("h3", `Group ${group.entry}: step ${group.step}, draw ${group.draw}, ${group.task}`);
  const facts = text("p", `${group.objective}, ${group.estimator}; sampled by ${group.worker} (${group.engine}); prompt of ${group.prompt.tokens} tokens`
    + (group.cut ? `; ${group.cut} tokens at the responses' ends are left out` : ""), "say");
  const versions = [...new Set(group.responses.flatMap((each) => each.tokens.version))].sort((one, other) => one - other);
  const prompt = text("div", group.prompt.text ?? `${group.prompt.tokens} tokens`, "tokens");
  const detail = text("div", "Point at a token, or walk with the arrow keys.", "detail");
  detail.setAttribute("role", "status");
  let left = MOST_TOKENS;
  const responses = group.responses.map((each) => {
    const count = Math.min(each.tokens.id.length, left);
    left -= count;
    return response(each, count, versions);
  });
  holder.replaceChildren(head, facts, tools(name, versions), detail, text("h3", "Prompt"), prompt, ...responses);
  explain(holder, detail, name);
}

function tools(name, versions) {
  const bar = text("div", "", "tools"), label = text("label", "Colour by ");
  const select = label.appendChild(document.createElement("select"));
  select.id = "colour-by";
  for (const [value, say] of [["weight", name], ["ratio", "importance ratio"], ["advantage", "advantage"], ["version", "policy version"], ["logprob", "behaviour log-prob"]])
    select.append(new Option(say, value, false, value === by));
  select.addEventListener("change", () => {
    by = select.value;
    draw();
    of("colour-by").focus();
  });
  const key = text("span", "", "key");
  if (by === "version") versions.forEach((version, place) => key.append(text("span", String(version), versionStyle(place))));
  else SCALES[by].words.forEach((words, place) => key.append(text("span", words, SCALES[by].styles[place])));
  key.append(text("span", "not sampled by the policy", "tool"), text("span", `weight below ${CLOSED_BELOW}: underlined`));
  bar.append(label, key);
  return bar;
}

const versionStyle = (place) => (place % 7 ? `v${place % 7}` : "");

function response(each, count, versions) {
  const box = text("div", "", "response"), tokens = text("div", "", "tokens");
  const parts = Object.entries(each.rewards).map(([name, value]) => `${name} ${number(value)}`);
  const advantage = each.advantage === null ? "no advantage" : `advantage ${each.advantage >= 0 ? "+" : ""}${number(each.advantage)}`;
  box.append(text("h3", `Response ${each.response}: reward ${number(each.reward)}${parts.length > 1 ? ` (${parts.join(", ")})` : ""}, ${advantage}, `
    + `ended by ${each.finish_reason}, ${each.tokens.id.length} tokens`));
  tokens.tabIndex = 0;
  tokens.setAttribute("role", "application");
  tokens.setAttribute("aria-label", `tokens of response ${each.response}; arrow keys walk`);
  for (let index = 0; index < count; index++) tokens.append(token(each, index, versions));
  if (count < each.tokens.id.length) tokens.append(text("em", ` ... ${each.tokens.id.length - count} more tokens`));
  tokens.source = each;
  box.append(tokens);
  return box;
}

function token(each, index, versions) {
  const { tokens } = each, value = tokens[COLUMN[by]][index], mask = tokens.mask[index];
  const span = text("span", written(tokens.text[index], tokens.id[index]));
  if (!mask) span.className = "tool";
  else if (by === "version") span.className = versionStyle(versions.indexOf(value));
  else if (value !== null) span.className = SCALES[by].styles[SCALES[by].edges.filter((edge) => edge <= value).length];
  const weight = tokens.gate_weight[index];
  if (mask && weight !== null && tokens.advantage[index] && weight < CLOSED_BELOW) span.classList.add("closed");
  return span;
}

// An end of line can be seen, and control characters are written out.
function written(content, id) {
  if (content === null) return `${id} `;
  return content.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (each) =>
    each === "\n" ? "\\n\n" : each === "\t" ? each : `\\u{${each.codePointAt(0).toString(16)}}`);
}

// The numbers of the token under the pointer, or of the one that was tapped or walked to.
function explain(holder, detail, name) {
  let marked = null;
  function tell(span) {
    const { source } = span.parentElement, { tokens } = source;
    const index = [...span.parentElement.children].indexOf(span);
    marked?.classList.remove("chosen");
    marked = span;
    span.classList.add("chosen");
    const logprob = tokens.behaviour_logprob[index], ratio = tokens.ratio[index];
    const facts = tokens.mask[index]
      ? [`${name.split(" of ")[0]} ${number(tokens.gate_weight[index], 4)}`, `ratio ${number(ratio, 4)}`, `advantage ${number(tokens.advantage[index], 4)}`,
        `version ${tokens.version[index]}`, `log-prob ${number(logprob, 4)} (${logprob === null ? "-" : `${number(100 * Math.exp(logprob))} %`})`,
        `coefficient ${number(tokens.coefficient[index], 4)}`]
      : ["not sampled by the policy: no weight"];
    detail.textContent = `response ${source.response}, token ${index}, ${JSON.stringify(tokens.text[index] ?? "")} (id ${tokens.id[index]}): ${facts.join(", ")}`;
  }
  const spanOf = (event) => (event.target.parentElement?.source && event.target.tagName === "SPAN" ? event.target : null);
  const point = (event) => { const span = spanOf(event); if (span && span !== marked) tell(span); };
  holder.onpointerover = point;
  holder.onclick = point;
  holder.onkeydown = (event) => {
    const walk = { ArrowRight: 1, ArrowLeft: -1 }[event.key], line = event.target;
    if (!walk || !line.source || !line.firstElementChild) return;
    event.preventDefault();
    const here = marked?.parentElement === line ? [...line.children].indexOf(marked) + walk : 0;
    const next = line.children[Math.max(0, here)];
    if (next?.tagName === "SPAN") tell(next);
  };
}
