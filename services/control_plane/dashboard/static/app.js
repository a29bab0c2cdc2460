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

let asked = false;
function changed() {
  if (asked || document.hidden) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    show(store);
    for (const chart of charts) chart.draw();
    groups();
  });
}

document.addEventListener("visibilitychange", changed);

const THEMES = ["", "light", "dark"];
const button = document.getElementById("theme");
function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  localStorage.setItem("theme", name);
  button.textContent = `theme: ${name || "system"}`;
  for (const chart of charts) chart.clear();
  changed();
}
theme(localStorage.getItem("theme") ?? "");
button.addEventListener("click", () => theme(THEMES[(THEMES.indexOf(localStorage.getItem("theme") ?? "") + 1) % 3]));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(localStorage.getItem("theme") ?? ""));

connect(store, {
  changed,
  said(what, kind) {
    const chip = document.getElementById("connection");
    chip.textContent = what;
    chip.className = `chip ${kind}`;
  },
});
