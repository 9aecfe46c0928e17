// The curves of two runs over all sites in one chart.
/* global echarts */
import { NAMES, colour, draw, fillSelect, lineChart, readCharts } from "./drawing.js";

const data = readCharts();
const select = document.getElementById("metric");

function drawCurves() {
  const name = select.value;
  const series = data.runs.map((run, i) => ({
    name: "AB"[i], strong: true, dashed: i === 1, colour: colour(i ? "ochre" : "accent"),
    values: run.metrics[name] ?? [],
  }));
  const rounds = data.runs.map((run) => run.rounds.map((round) => (name === "loss" ? round : round - 1)));
  const option = lineChart(name, [], series, { xName: name === "loss" ? "round" : "finished rounds" });
  option.series.forEach((line, i) => {
    line.data = series[i].values.map((value, j) => [rounds[i][j], value]).filter((point) => point[1] !== null);
  });
  draw("curves", option);
}

if (data) {
  const names = Object.keys(NAMES).filter((name) => data.runs.some((run) => run.metrics[name]));
  fillSelect(select, names.map((name) => [name, NAMES[name]]), "accuracy");
  select.addEventListener("change", drawCurves);
  document.addEventListener("theme", drawCurves);
  addEventListener("resize", () => echarts.getInstanceByDom(document.getElementById("curves"))?.resize());
  drawCurves();
}
