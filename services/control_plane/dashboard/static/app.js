// Puts the page together. Nothing is drawn while nobody looks, and never more than once per message.
import { Chart } from "./charts.js";
import { connect } from "./live.js";
import { show } from "./now.js";
import { PANELS } from "./panels.js";
import { Store } from "./store.js";
import { browser } from "./tokens.js";

if (location.hash.startsWith("#token=")) history.replaceState(null, "", location.pathname);  // logged in already

const store = new Store();
const charts = PANELS.map((panel) => new Chart(panel, store, document.querySelector(`#${panel.section} .panels`)));
const groups = browser(store);

// Drawing takes this share of a page's time at most, for the machine may be the one that trains: a page that takes long to
// draw, or that nobody gives the time to, draws less often.
const SHARE = 1 / 50, LONGEST = 10_000;  // ms between two drawings, at most
let asked = 0, frame = 0, due = 0, took = 0;

function changed() {
  if (asked || document.hidden) return;
  ask(Math.max(0, due - performance.now()));
}

function atOnce() {
  clearTimeout(asked);
  cancelAnimationFrame(frame);
  ask(0);
}

function ask(delay) {
  asked = setTimeout(() => { frame = requestAnimationFrame(draw); }, delay);
}

function draw() {
  const begun = performance.now();
  asked = 0;
  show(store);
  for (const chart of charts) chart.draw();
  groups();
  setTimeout(() => {  // when all is painted
    const before = took;
    took = performance.now() - begun;
    due = begun + Math.min(LONGEST, before / SHARE, took / SHARE);  // that one alone takes long says nothing
  });
}

const THEMES = ["", "light", "dark"];
const button = document.getElementById("theme");
function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  localStorage.setItem("theme", name);
  button.textContent = `theme: ${name || "system"}`;
  for (const chart of charts) chart.clear();
  atOnce();
}
theme(localStorage.getItem("theme") ?? "");
button.addEventListener("click", () => theme(THEMES[(THEMES.indexOf(localStorage.getItem("theme") ?? "") + 1) % 3]));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(localStorage.getItem("theme") ?? ""));

connect(store, {
  changed,
  loaded: atOnce,
  said(what, kind) {
    const chip = document.getElementById("connection");
    chip.textContent = what;
    chip.className = `chip ${kind}`;
  },
});
