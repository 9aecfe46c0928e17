// The pooled curves of two runs in one chart.
/* global echarts */
import { NAMES, colour, draw, fill, lines, readCharts } from "./drawing.js";

const data = readCharts();
const select = document.getElementById("metric");

function curves() {
  const name = select.value;
  const series = data.runs.map((run, i) => ({
    name: "AB"[i], strong: true, dashed: i === 1, colour: colour(i ? "ochre" : "accent"),
    values: run.metrics[name] ?? [],
  }));
  const rounds = data.runs.map((run) => run.rounds.map((round) => (name === "loss" ? round : round - 1)));
  const option = lines(name, [], series, { xName: name === "loss" ? "round" : "rounds finished" });
  option.series.forEach((one, i) => {
    one.data = series[i].values.map((value, at) => [rounds[i][at], value]).filter((point) => point[1] !== null);
  });
  draw("curves", option);
}

if (data) {
  const names = Object.keys(NAMES).filter((name) => data.runs.some((run) => run.metrics[name]));
  fill(select, names.map((name) => [name, NAMES[name]]), "accuracy");
  select.addEventListener("change", curves);
  document.addEventListener("theme", curves);
  addEventListener("resize", () => echarts.getInstanceByDom(document.getElementById("curves"))?.resize());
  curves();
}
