// The charts of a run's page, drawn anew when the page is told of news or changes its colours.
/* global echarts */
import { NAMES, draw, fill, format, heat, lines, participation, readCharts, siteSeries, traffic } from "./drawing.js";

let data = readCharts();
let following = true;  // the slider stays at the newest round until it is moved
const by = (id) => document.getElementById(id);
const say = (id, words) => { by(id).textContent = words; };

function empty(id, words) {
  const box = by(id);
  if (!box) return;
  echarts.getInstanceByDom(box)?.dispose();
  box.textContent = words;
  box.classList.add("none");
}

function show(id, option) {
  const box = by(id);
  if (box.classList.contains("none")) { box.textContent = ""; box.classList.remove("none"); }
  draw(id, option);
}

function curves() {
  const name = by("metric").value;
  const told = data.metrics[name];
  if (!told) return empty("curves", "Nothing has been told yet.");
  // A row's accuracy is that of the model which its round began with; its loss is of the round itself.
  const x = name === "loss" ? data.rounds : data.rounds.map((round) => round - 1);
  show("curves", lines(name, x, siteSeries(told, data.sites, by("highlight").value), {
    xName: name === "loss" ? "round" : "rounds finished",
  }));
  const known = told.pooled.map((value, at) => [x[at], value]).filter((point) => point[1] !== null);
  if (known.length) say("curves-words", `${NAMES[name]} of all sites together: ${format(name, known[0][1])} at ${known[0][0]}, ${format(name, known.at(-1)[1])} at ${known.at(-1)[0]}.`);
}

function drift() {
  const name = by("drift-of").value;
  const told = data.drift[name];
  by("drift-of").disabled = !told;
  if (!told) return empty("drift", by("drift-missing")?.textContent ?? "Nothing has been told yet.");
  show("drift", lines(name, data.rounds, siteSeries(told, data.sites, by("highlight").value, { pooled: false }), { xName: "round" }));
}

function heats() {
  const slider = by("heat-round");
  const rounds = data.heat.rounds ?? [];
  slider.disabled = !rounds.length;
  if (!rounds.length) { by("heat-now").value = ""; return empty("heat", "No round has been kept yet."); }
  slider.max = rounds.length - 1;
  if (following) slider.value = rounds.length - 1;
  by("heat-now").value = rounds[slider.value];
  slider.setAttribute("aria-valuetext", `round ${rounds[slider.value]}`);
  show("heat", heat(data.heat, Number(slider.value)));
}

function part() {
  // A row for each site needs its height.
  by("part").style.height = data.sites.length > 20 ? `${80 + 13 * data.sites.length}px` : "";
  echarts.getInstanceByDom(by("part"))?.resize();
  if (data.sites.length) show("part", participation(data)); else empty("part", "No site has replied yet.");
}

function bytes() {
  if (data.rounds.length) show("bytes", traffic(data)); else empty("bytes", "Nothing was exchanged yet.");
}

function privacy() {
  if (data.epsilon.length) show("privacy", lines("epsilon", data.rounds, [{ name: "epsilon", values: data.epsilon, strong: true }], { xName: "round", limit: data.budget }));
}

const DRAWERS = { curves, part, heat: heats, drift, bytes, privacy };
const waiting = new Set();
const idle = window.requestIdleCallback ?? ((work) => setTimeout(work, 100));

function drawOne(id) {
  if (waiting.delete(id)) DRAWERS[id]();
}

// What is seen is drawn at once, the rest when the browser has time, so that a page of many sites opens fast.
const watcher = new IntersectionObserver((seen) => seen.forEach((one) => one.isIntersecting && drawOne(one.target.id)));

function drawRest() {
  const [next] = waiting;
  if (!next) return;
  drawOne(next);
  idle(drawRest);
}

function all() {
  fill(by("metric"), Object.keys(data.metrics).map((name) => [name, NAMES[name] ?? name]), "accuracy");
  fill(by("drift-of"), Object.keys(data.drift).map((name) => [name, NAMES[name]]), "update_norm");
  fill(by("highlight"), [["", "no site"], ...data.sites.map((site) => [site, site])], "");
  by("privacy-box").hidden = !data.epsilon.length;
  for (const id of Object.keys(DRAWERS)) {
    waiting.add(id);
    // Looked at anew, it tells at once whether it is seen.
    watcher.unobserve(by(id));
    watcher.observe(by(id));
  }
  idle(drawRest);
}

by("metric").addEventListener("change", curves);
by("highlight").addEventListener("change", () => { curves(); drift(); });
by("drift-of").addEventListener("change", drift);
by("heat-round").addEventListener("input", (event) => { following = event.target.value === event.target.max; heats(); });
document.addEventListener("charts", (event) => { data = event.detail; all(); });
document.addEventListener("theme", all);
addEventListener("resize", () => document.querySelectorAll(".chart").forEach((box) => echarts.getInstanceByDom(box)?.resize()));
all();
