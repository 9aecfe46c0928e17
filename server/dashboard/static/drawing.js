// Turns series into ECharts options. Colours are the page's CSS variables, so that charts follow light and dark.
/* global echarts */

export function readCharts() {
  const element = document.getElementById("charts");
  return element ? JSON.parse(element.textContent) : null;
}

export const NAMES = {
  accuracy: "Accuracy", balanced_accuracy: "Balanced accuracy", auroc: "AUROC", f1: "F1",
  ece: "Calibration error", loss: "Training loss",
  update_norm: "Norm of the update", update_cosine: "Cosine with the mean update", shift_norm: "Norm of the shift",
};
const FRACTIONS = new Set(["accuracy", "balanced_accuracy"]);
const MAX_NAMED_SITES = 8;

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

export function draw(id, option) {
  const element = document.getElementById(id);
  if (!element) return;
  const chart = echarts.getInstanceByDom(element) ?? echarts.init(element);
  const ink = colour("ink"), muted = colour("muted"), rule = colour("rule");
  const axis = { axisLabel: { color: muted }, axisLine: { lineStyle: { color: rule } }, splitLine: { lineStyle: { color: rule } }, nameTextStyle: { color: muted } };
  const styled = (option) => (Array.isArray(option) ? option.map(styled) : { ...axis, ...option });
  chart.setOption({
    animation: false,
    textStyle: { fontFamily: getComputedStyle(document.body).fontFamily, color: ink },
    ...option,
    tooltip: { renderMode: "richText", backgroundColor: colour("panel"), borderColor: rule, textStyle: { color: ink }, ...option.tooltip },
    ...(option.xAxis && { xAxis: styled(option.xAxis), yAxis: styled(option.yAxis) }),
  }, true);
}

export const formatValue = (name, value) =>
  value === null || value === undefined ? "–" : FRACTIONS.has(name) ? `${(100 * value).toFixed(1)}%` : value.toPrecision(3);

// A line chart; the lines of sites are thin, so that fifty of them stay readable.
export function lineChart(name, x, series, { xName = "finished rounds", limit = null } = {}) {
  const many = series.filter((line) => line.site).length > MAX_NAMED_SITES;
  return {
    grid: { left: 56, right: 16, top: many ? 16 : 44, bottom: 44 },
    legend: many ? undefined : { type: "scroll", top: 0, textStyle: { color: colour("muted") }, data: series.map((line) => line.name) },
    xAxis: { type: "value", name: xName, nameLocation: "middle", nameGap: 28, min: "dataMin", max: "dataMax", minInterval: 1, splitLine: { show: false } },
    yAxis: { type: "value", scale: true, axisLabel: { color: colour("muted"), formatter: (value) => (FRACTIONS.has(name) ? `${Math.round(100 * value)}%` : String(value)) } },
    tooltip: many
      ? { trigger: "item", formatter: (point) => `${point.seriesName}, ${point.value[0]}: ${formatValue(name, point.value[1])}` }
      : { trigger: "axis", valueFormatter: (value) => formatValue(name, value) },
    series: series.map((line, i) => ({
      name: line.name, type: "line", connectNulls: true, symbolSize: 5,
      showSymbol: x.length <= 30 && !many,
      data: line.values.map((value, j) => [x[j], value]).filter((point) => point[1] !== null),
      z: line.strong ? 5 : 2,
      lineStyle: { width: line.strong ? 3 : 1.2, opacity: line.strong || !many ? 1 : 0.35, type: line.dashed ? "dashed" : "solid" },
      color: line.colour ?? (line.strong ? colour("ink") : many ? colour("muted") : colour(`s${i % 8}`)),
      emphasis: { focus: "series", lineStyle: { width: 3, opacity: 1 } },
      ...(limit !== null && i === 0 && { markLine: { silent: true, symbol: "none", lineStyle: { color: colour("alarm") }, data: [{ yAxis: limit }], label: { formatter: `budget ${limit}`, color: colour("alarm") } } }),
    })),
  };
}

export function siteSeries(metric, sites, highlight, { allSites = true } = {}) {
  const series = sites.map((name, i) => ({ name, site: true, values: metric.sites[i], strong: name === highlight, ...(name === highlight && { colour: colour("ochre") }) }));
  const hasValues = metric.all_sites.some((value) => value !== null);
  return allSites && hasValues ? [...series, { name: "All sites", values: metric.all_sites, strong: true }] : series;
}

const STATUSES = [["a", "accepted", "s0"], ["l", "late", "s6"], ["r", "rejected", "s1"], ["f", "failed", "alarm"]];

export function participationChart(data) {
  const cells = [];
  data.sites.forEach((site, row) => [...data.participation[site]].forEach((code, column) => {
    const status = STATUSES.findIndex(([letter]) => letter === code);
    if (status >= 0) cells.push([column, row, status]);
  }));
  return {
    grid: { left: 108, right: 16, top: 44, bottom: 44 },
    xAxis: { type: "category", data: data.rounds, name: "round", nameLocation: "middle", nameGap: 28, splitLine: { show: false } },
    yAxis: { type: "category", data: data.sites, inverse: true, splitLine: { show: false }, axisLabel: { color: colour("muted"), width: 84, overflow: "truncate" } },
    visualMap: {
      type: "piecewise", orient: "horizontal", left: 0, top: 0, itemSymbol: "rect", textStyle: { color: colour("muted") },
      pieces: STATUSES.map(([, label, name], value) => ({ value, label, color: colour(name) })), dimension: 2,
    },
    tooltip: { formatter: (cell) => `${data.sites[cell.value[1]]}, round ${data.rounds[cell.value[0]]}: ${STATUSES[cell.value[2]][1]}` },
    series: [{ type: "heatmap", data: cells, itemStyle: { borderColor: colour("paper"), borderWidth: data.rounds.length > 60 ? 0 : 1 } }],
  };
}

export function shiftChart(data, index) {
  const towers = Object.entries(data.towers);
  const values = towers.flatMap(([, tower]) => tower.values.flat(2)).filter((value) => typeof value === "number");
  const largest = Math.max(...values, 1e-12);
  const width = 100 / towers.length;
  const position = (i) => ({ left: `${i * width + 7}%`, width: `${width - 10}%`, top: 30, bottom: 86 });
  return {
    title: towers.map(([name], i) => ({ text: `${name} tower`, left: `${i * width + 7}%`, top: 0, textStyle: { fontSize: 13, fontWeight: 500, color: colour("muted") } })),
    grid: towers.map((_, i) => position(i)),
    xAxis: towers.map(([, tower], i) => ({ type: "category", gridIndex: i, data: tower.layers, name: "layer", nameLocation: "middle", nameGap: 26, splitLine: { show: false } })),
    yAxis: towers.map(([, tower], i) => ({ type: "category", gridIndex: i, data: tower.parts, inverse: true, splitLine: { show: false } })),
    visualMap: { min: 0, max: largest, calculable: false, orient: "horizontal", left: "center", bottom: 0, precision: 4, text: [largest.toPrecision(2), "0"], textStyle: { color: colour("muted") }, inRange: { color: [colour("panel"), colour("accent")] } },
    tooltip: { formatter: (cell) => `${towers[cell.seriesIndex][0]}, ${towers[cell.seriesIndex][1].parts[cell.value[1]]}, layer ${towers[cell.seriesIndex][1].layers[cell.value[0]]}: ${cell.value[2].toPrecision(3)}` },
    series: towers.map(([, tower], i) => ({
      type: "heatmap", xAxisIndex: i, yAxisIndex: i, itemStyle: { borderColor: colour("paper"), borderWidth: 1 },
      data: (tower.values[index] ?? []).flatMap((layers, row) => (layers ?? []).map((value, column) => [column, row, value])).filter((cell) => cell[2] !== null),
    })),
  };
}

const UNITS = ["B", "kB", "MB", "GB"];
function formatBytes(bytes) {
  let i = 0;
  while (Math.abs(bytes) >= 1000 && i < UNITS.length - 1) { bytes /= 1000; i += 1; }
  return `${bytes.toPrecision(3)} ${UNITS[i]}`;
}

export function bytesChart(data) {
  return {
    grid: { left: 72, right: 16, top: 44, bottom: 44 },
    legend: { top: 0, left: 0, textStyle: { color: colour("muted") } },
    xAxis: { type: "category", data: data.rounds, name: "round", nameLocation: "middle", nameGap: 28 },
    yAxis: { type: "value", axisLabel: { color: colour("muted"), formatter: formatBytes } },
    tooltip: { trigger: "axis", valueFormatter: formatBytes },
    series: [["up", "from the sites", "s0"], ["down", "to the sites", "s1"]].map(([direction, name, tone]) => ({ name, type: "bar", stack: "all", color: colour(tone), data: data.bytes[direction] })),
  };
}

export function fillSelect(select, options, initial) {
  const selected = select.value || initial;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === selected)));
}
