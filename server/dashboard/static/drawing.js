// From series to ECharts' options. Colours are the page's own, so charts follow light and dark.
/* global echarts */

export function readCharts() {
  const element = document.getElementById("charts");
  return element ? JSON.parse(element.textContent) : null;
}

export const NAMES = {
  accuracy: "Accuracy", balanced_accuracy: "Balanced accuracy", auroc: "AUROC", f1: "F1",
  ece: "Calibration error", loss: "Training loss",
  update_norm: "Norm of the change", update_cosine: "Cosine with the mean change", shift_norm: "Norm of the shift",
};
const SHARES = new Set(["accuracy", "balanced_accuracy"]);
export const FEW = 8;

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

export function draw(id, option) {
  const element = document.getElementById(id);
  if (!element) return;
  const chart = echarts.getInstanceByDom(element) ?? echarts.init(element);
  const ink = colour("ink"), muted = colour("muted"), rule = colour("rule");
  const axis = { axisLabel: { color: muted }, axisLine: { lineStyle: { color: rule } }, splitLine: { lineStyle: { color: rule } }, nameTextStyle: { color: muted } };
  const dress = (one) => (Array.isArray(one) ? one.map(dress) : { ...axis, ...one });
  chart.setOption({
    animation: false,
    textStyle: { fontFamily: getComputedStyle(document.body).fontFamily, color: ink },
    ...option,
    tooltip: { renderMode: "richText", backgroundColor: colour("panel"), borderColor: rule, textStyle: { color: ink }, ...option.tooltip },
    ...(option.xAxis && { xAxis: dress(option.xAxis), yAxis: dress(option.yAxis) }),
  }, true);
}

export const format = (name, value) =>
  value === null || value === undefined ? "–" : SHARES.has(name) ? `${(100 * value).toFixed(1)}%` : value.toPrecision(3);

// A line for each series; thin ones are sites, so that fifty of them stay readable.
export function lines(name, x, series, { xName = "rounds finished", limit = null } = {}) {
  const many = series.filter((one) => one.site).length > FEW;
  return {
    grid: { left: 56, right: 16, top: many ? 16 : 44, bottom: 44 },
    legend: many ? undefined : { type: "scroll", top: 0, textStyle: { color: colour("muted") }, data: series.map((one) => one.name) },
    xAxis: { type: "value", name: xName, nameLocation: "middle", nameGap: 28, min: "dataMin", max: "dataMax", minInterval: 1, splitLine: { show: false } },
    yAxis: { type: "value", scale: true, axisLabel: { color: colour("muted"), formatter: (value) => (SHARES.has(name) ? `${Math.round(100 * value)}%` : String(value)) } },
    tooltip: many
      ? { trigger: "item", formatter: (at) => `${at.seriesName}, ${at.value[0]}: ${format(name, at.value[1])}` }
      : { trigger: "axis", valueFormatter: (value) => format(name, value) },
    series: series.map((one, i) => ({
      name: one.name, type: "line", connectNulls: true, symbolSize: 5,
      showSymbol: x.length <= 30 && !many,
      data: one.values.map((value, at) => [x[at], value]).filter((point) => point[1] !== null),
      z: one.strong ? 5 : 2,
      lineStyle: { width: one.strong ? 3 : 1.2, opacity: one.strong || !many ? 1 : 0.35, type: one.dashed ? "dashed" : "solid" },
      color: one.colour ?? (one.strong ? colour("ink") : many ? colour("muted") : colour(`s${i % 8}`)),
      emphasis: { focus: "series", lineStyle: { width: 3, opacity: 1 } },
      ...(limit !== null && i === 0 && { markLine: { silent: true, symbol: "none", lineStyle: { color: colour("alarm") }, data: [{ yAxis: limit }], label: { formatter: `budget ${limit}`, color: colour("alarm") } } }),
    })),
  };
}

export function siteSeries(told, sites, highlight, { pooled = true } = {}) {
  const found = sites.map((name, i) => ({ name, site: true, values: told.sites[i], strong: name === highlight, ...(name === highlight && { colour: colour("ochre") }) }));
  const together = told.pooled.some((value) => value !== null);
  return pooled && together ? [...found, { name: "all sites", values: told.pooled, strong: true }] : found;
}

const KINDS = [["a", "accepted", "s0"], ["l", "late", "s6"], ["r", "rejected", "s1"], ["f", "failed", "alarm"]];

export function participation(data) {
  const cells = [];
  data.sites.forEach((site, row) => [...data.part[site]].forEach((code, column) => {
    const kind = KINDS.findIndex(([letter]) => letter === code);
    if (kind >= 0) cells.push([column, row, kind]);
  }));
  return {
    grid: { left: 108, right: 16, top: 44, bottom: 44 },
    xAxis: { type: "category", data: data.rounds, name: "round", nameLocation: "middle", nameGap: 28, splitLine: { show: false } },
    yAxis: { type: "category", data: data.sites, inverse: true, splitLine: { show: false }, axisLabel: { color: colour("muted"), width: 84, overflow: "truncate" } },
    visualMap: {
      type: "piecewise", orient: "horizontal", left: 0, top: 0, itemSymbol: "rect", textStyle: { color: colour("muted") },
      pieces: KINDS.map(([, label, name], value) => ({ value, label, color: colour(name) })), dimension: 2,
    },
    tooltip: { formatter: (at) => `${data.sites[at.value[1]]}, round ${data.rounds[at.value[0]]}: ${KINDS[at.value[2]][1]}` },
    series: [{ type: "heatmap", data: cells, itemStyle: { borderColor: colour("paper"), borderWidth: data.rounds.length > 60 ? 0 : 1 } }],
  };
}

export function heat(data, at) {
  const towers = Object.entries(data.towers);
  const all = towers.flatMap(([, one]) => one.values.flat(2)).filter((value) => typeof value === "number");
  const largest = Math.max(...all, 1e-12);
  const wide = 100 / towers.length;
  const place = (i) => ({ left: `${i * wide + 7}%`, width: `${wide - 10}%`, top: 30, bottom: 86 });
  return {
    title: towers.map(([tower], i) => ({ text: `${tower} tower`, left: `${i * wide + 7}%`, top: 0, textStyle: { fontSize: 13, fontWeight: 500, color: colour("muted") } })),
    grid: towers.map((_, i) => place(i)),
    xAxis: towers.map(([, one], i) => ({ type: "category", gridIndex: i, data: one.layers, name: "layer", nameLocation: "middle", nameGap: 26, splitLine: { show: false } })),
    yAxis: towers.map(([, one], i) => ({ type: "category", gridIndex: i, data: one.parts, inverse: true, splitLine: { show: false } })),
    visualMap: { min: 0, max: largest, calculable: false, orient: "horizontal", left: "center", bottom: 0, precision: 4, text: [largest.toPrecision(2), "0"], textStyle: { color: colour("muted") }, inRange: { color: [colour("panel"), colour("accent")] } },
    tooltip: { formatter: (cell) => `${towers[cell.seriesIndex][0]}, ${towers[cell.seriesIndex][1].parts[cell.value[1]]}, layer ${towers[cell.seriesIndex][1].layers[cell.value[0]]}: ${cell.value[2].toPrecision(3)}` },
    series: towers.map(([, one], i) => ({
      type: "heatmap", xAxisIndex: i, yAxisIndex: i, itemStyle: { borderColor: colour("paper"), borderWidth: 1 },
      data: (one.values[at] ?? []).flatMap((values, row) => (values ?? []).map((value, column) => [column, row, value])).filter((cell) => cell[2] !== null),
    })),
  };
}

const UNITS = ["B", "kB", "MB", "GB"];
function amount(bytes) {
  let i = 0;
  while (Math.abs(bytes) >= 1000 && i < UNITS.length - 1) { bytes /= 1000; i += 1; }
  return `${bytes.toPrecision(3)} ${UNITS[i]}`;
}

export function traffic(data) {
  return {
    grid: { left: 72, right: 16, top: 44, bottom: 44 },
    legend: { top: 0, left: 0, textStyle: { color: colour("muted") } },
    xAxis: { type: "category", data: data.rounds, name: "round", nameLocation: "middle", nameGap: 28 },
    yAxis: { type: "value", axisLabel: { color: colour("muted"), formatter: amount } },
    tooltip: { trigger: "axis", valueFormatter: amount },
    series: [["up", "from the sites", "s0"], ["down", "to the sites", "s1"]].map(([way, name, tone]) => ({ name, type: "bar", stack: "all", color: colour(tone), data: data.bytes[way] })),
  };
}

export function fill(select, options, chosen) {
  const before = select.value || chosen;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === before)));
}
