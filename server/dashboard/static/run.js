// The charts of a run's page, redrawn when the run or the colour scheme changes.
/* global echarts */
import { NAMES, draw, bytesChart, fillSelect, formatValue, lineChart, participationChart, readCharts, shiftChart, siteSeries } from "./drawing.js";

let data = readCharts();
let following = true;  // the slider stays at the latest round until it is moved
const byId = (id) => document.getElementById(id);
const setText = (id, text) => { byId(id).textContent = text; };

function showMessage(id, text) {
  const box = byId(id);
  if (!box) return;
  echarts.getInstanceByDom(box)?.dispose();
  box.textContent = text;
  box.classList.add("none");
}

function show(id, option) {
  const box = byId(id);
  if (box.classList.contains("none")) { box.textContent = ""; box.classList.remove("none"); }
  draw(id, option);
}

function drawCurves() {
  const name = byId("metric").value;
  const metric = data.metrics[name];
  if (!metric) return showMessage("curves", "No values yet.");
  // A row has the accuracy of the model that its round started from, but the loss of the round itself.
  const x = name === "loss" ? data.rounds : data.rounds.map((round) => round - 1);
  show("curves", lineChart(name, x, siteSeries(metric, data.sites, byId("highlight").value), {
    xName: name === "loss" ? "round" : "finished rounds",
  }));
  const points = metric.all_sites.map((value, i) => [x[i], value]).filter((point) => point[1] !== null);
  if (points.length) setText("curves-note", `${NAMES[name]} over all sites: ${formatValue(name, points[0][1])} at ${points[0][0]}, ${formatValue(name, points.at(-1)[1])} at ${points.at(-1)[0]}.`);
}

function drawUpdates() {
  const name = byId("update-metric").value;
  const metric = data.updates[name];
  byId("update-metric").disabled = !metric;
  if (!metric) return showMessage("updates", byId("updates-note-missing")?.textContent ?? "No values yet.");
  show("updates", lineChart(name, data.rounds, siteSeries(metric, data.sites, byId("highlight").value, { allSites: false }), { xName: "round" }));
}

function drawShift() {
  const slider = byId("shift-round");
  const rounds = data.shift_magnitude.rounds ?? [];
  slider.disabled = !rounds.length;
  if (!rounds.length) { byId("shift-round-value").value = ""; return showMessage("shift-magnitude", "No finished rounds yet."); }
  slider.max = rounds.length - 1;
  if (following) slider.value = rounds.length - 1;
  byId("shift-round-value").value = rounds[slider.value];
  slider.setAttribute("aria-valuetext", `round ${rounds[slider.value]}`);
  show("shift-magnitude", shiftChart(data.shift_magnitude, Number(slider.value)));
}

function drawParticipation() {
  const box = byId("participation");
  // Each site needs the height of a row.
  box.style.height = data.sites.length > 20 ? `${80 + 13 * data.sites.length}px` : "";
  echarts.getInstanceByDom(box)?.resize();
  if (data.sites.length) show("participation", participationChart(data)); else showMessage("participation", "No replies yet.");
}

function drawBytes() {
  if (data.rounds.length) show("bytes", bytesChart(data)); else showMessage("bytes", "No exchanges yet.");
}

function drawPrivacy() {
  if (data.epsilon.length) show("privacy", lineChart("epsilon", data.rounds, [{ name: "epsilon", values: data.epsilon, strong: true }], { xName: "round", limit: data.epsilon_limit }));
}

const DRAWERS = { curves: drawCurves, participation: drawParticipation, "shift-magnitude": drawShift, updates: drawUpdates, bytes: drawBytes, privacy: drawPrivacy };
const pending = new Set();
const whenIdle = window.requestIdleCallback ?? ((work) => setTimeout(work, 100));

function drawOne(id) {
  if (pending.delete(id)) DRAWERS[id]();
}

// Visible charts are drawn at once and the others when the browser is idle, so that pages of many sites load fast.
const observer = new IntersectionObserver((entries) => entries.forEach((entry) => entry.isIntersecting && drawOne(entry.target.id)));

function drawRest() {
  const [next] = pending;
  if (!next) return;
  drawOne(next);
  whenIdle(drawRest);
}

function drawAll() {
  fillSelect(byId("metric"), Object.keys(data.metrics).map((name) => [name, NAMES[name] ?? name]), "accuracy");
  fillSelect(byId("update-metric"), Object.keys(data.updates).map((name) => [name, NAMES[name]]), "update_norm");
  fillSelect(byId("highlight"), [["", "no site"], ...data.sites.map((site) => [site, site])], "");
  byId("privacy-box").hidden = !data.epsilon.length;
  for (const id of Object.keys(DRAWERS)) {
    pending.add(id);
    // Observing an element again reports at once whether it is visible.
    observer.unobserve(byId(id));
    observer.observe(byId(id));
  }
  whenIdle(drawRest);
}

byId("metric").addEventListener("change", drawCurves);
byId("highlight").addEventListener("change", () => { drawCurves(); drawUpdates(); });
byId("update-metric").addEventListener("change", drawUpdates);
byId("shift-round").addEventListener("input", (event) => { following = event.target.value === event.target.max; drawShift(); });
document.addEventListener("charts", (event) => { data = event.detail; drawAll(); });
document.addEventListener("theme", drawAll);
addEventListener("resize", () => document.querySelectorAll(".chart").forEach((box) => echarts.getInstanceByDom(box)?.resize()));
drawAll();
