// The moment: state and progress, alerts, services, workers, ledger.
import { number, put, rows, seconds, text } from "./dom.js";

const of = (id) => document.getElementById(id);
const OUTCOMES = ["trained", "degenerate", "stale", "invalid", "refused", "skipped", "backlog"];

export function show(store) {
  const now = store.now;
  if (!now) return;
  document.title = `${now.alerts.length ? `(${now.alerts.length}) ` : ""}${now.run}: step ${now.step} - sapo`;
  for (const [id, said] of Object.entries({ run: now.run, state: now.state, step: `step ${now.step} of ${now.steps}` })) {
    put(of(id), [document.createTextNode(said)]);
  }
  Object.assign(of("progress"), { max: now.steps, value: Math.min(now.step, now.steps) });
  alerts(now.alerts);
  figures(store);
  services(now);
  workers(now);
  ledger(now.ledger);
  put(of("notes"), now.notes.map((note) => text("li", note)));
}

let saidAlerts = "";
function alerts(found) {
  const said = JSON.stringify(found);
  if (said === saidAlerts) return;  // or a screen reader would say it twice a second
  saidAlerts = said;
  of("alerts").replaceChildren(...found.map(({ name, severity, what, fix }) => {
    const alert = text("div", "", `alert ${severity}`);
    alert.append(text("b", name), `${what}. `, text("span", fix));
    return alert;
  }));
}

function figures(store) {
  const now = store.now, steps = store.steps;
  const sampled = now.workers.reduce((sum, each) => sum + (each.tokens_per_second ?? 0), 0);
  const best = store.evaluations.last("pass_at_1");
  const found = {
    "reward": number(steps.last("reward")), "held-out pass@1": number(best), "entropy, nats": number(steps.last("entropy")),
    "policy version": number(now.version), "tokens sampled/s": number(Math.round(sampled)),
    "tokens trained/s": number(Math.round(steps.last("tokens_per_second") ?? 0)), "groups ready": number(now.groups_ready),
    "open leases": number(now.open_leases),
  };
  put(of("figures"), Object.entries(found).filter(([, value]) => value !== "-").map(([name, value]) => {
    const box = document.createElement("div");
    box.append(text("dt", name), text("dd", value));
    return box;
  }));
}

function services(now) {
  document.querySelector("#health .tables").hidden = !now.services.length;  // of a run that has stopped
  rows(of("services"), now.services.map((each) => [
    each.name, { say: each.state, name: each.ok ? "good" : "bad" }, each.waiting_for || "-",
  ]));
}

function workers(now) {
  const alive = now.workers.map((each) => [
    each.worker, heard(each.age_seconds), number(each.version), String(each.behind),
    String(each.rows), number(Math.round(each.tokens_per_second)), each.probe ? number(each.probe.max) : "-", each.waiting_for || "-",
  ]);
  const gone = now.gone.map((each) => [
    each.worker, { say: `gone for ${seconds(each.age_seconds)}`, name: "bad" }, number(each.version), "-", "-", "-", "-", "-",
  ]);
  const all = [...alive, ...gone];
  rows(of("workers"), all.length ? all : [["none is heard of", "-", "-", "-", "-", "-", "-", "-"]],
    (index) => (index >= alive.length ? "gone" : ""));
}

const SILENT_SECONDS = 4;  // of a worker that says something every second
const heard = (age) => ({ say: `${age > SILENT_SECONDS ? "silent for" : "heard"} ${seconds(age)}${age > SILENT_SECONDS ? "" : " ago"}`,
  name: age > SILENT_SECONDS ? "bad" : "good" });

function ledger(found) {
  if (!found) return;
  const counts = ["accepted", ...OUTCOMES].map((name) => [name, String(found[name] ?? 0)]);
  const verdict = ["sum", { say: found.balanced ? "balances" : "DOES NOT BALANCE", name: found.balanced ? "good" : "bad" }];
  const columns = [...counts, ["open draws", String(found.open_draws)], verdict];
  rows(of("ledger"), [columns.map(([, value]) => value)]);
  put(of("ledger-names"), columns.map(([name]) => Object.assign(text("th", name), { scope: "col" })));
}
