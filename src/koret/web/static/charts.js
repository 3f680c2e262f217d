// Small charts as SVG: means with intervals, and training curves.

import { draw } from "./elements.js";

const ROW = 17;
const GAP = 20;

export function drawIntervals(systems, metrics) {
  const [left, width, right] = [92, 560, 20];
  const block = systems.length * ROW + GAP;
  const height = metrics.length * block + 18;
  const x = (value) => left + value * (width - left - right);
  const parts = [];
  for (let tick = 0; tick <= 10; tick += 2) {
    parts.push(draw("line", { class: "grid", x1: x(tick / 10), x2: x(tick / 10), y1: 6, y2: height - 18 }));
    parts.push(draw("text", { class: "tick", x: x(tick / 10), y: height - 4, "text-anchor": "middle" }, (tick / 10).toFixed(1)));
  }
  metrics.forEach(([key, label], place) => {
    const top = 12 + place * block;
    parts.push(draw("text", { x: left - 12, y: top + (systems.length * ROW) / 2 + 1, "text-anchor": "end" }, label));
    systems.forEach((system, row) => {
      const value = system.metrics[key];
      if (!value) return;
      const y = top + row * ROW + 4;
      parts.push(draw("g", { class: `kind-${system.kind}` },
        draw("title", {}, `${system.name} ${label} ${value.mean.toFixed(3)}`),
        draw("line", { class: "whisker", x1: x(value.low), x2: x(value.high), y1: y, y2: y }),
        draw("circle", { class: "point", cx: x(value.mean), cy: y, r: 4.5 })));
    });
  });
  const label = systems.map((s) => `${s.name}: ${metrics.map(([k, n]) => (s.metrics[k] ? `${n} ${s.metrics[k].mean.toFixed(3)}` : "")).join(", ")}`);
  return draw("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label.join("; ") }, parts);
}

export function drawCurve(points, name, step) {
  const [width, height, left, bottom] = [320, 170, 46, 24];
  const xs = points.map((p) => p[0]);
  const ys = points.map((p) => p[1]);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const floor = Math.min(0, ...ys);
  const roof = Math.max(...ys) || 1;
  const x = (value) => left + ((value - x0) / (x1 - x0 || 1)) * (width - left - 10);
  const y = (value) => 10 + (1 - (value - floor) / (roof - floor || 1)) * (height - bottom - 10);
  const parts = [];
  for (const value of [floor, (floor + roof) / 2, roof]) {
    parts.push(draw("line", { class: "grid", x1: left, x2: width - 10, y1: y(value), y2: y(value) }));
    parts.push(draw("text", { class: "tick", x: left - 6, y: y(value) + 4, "text-anchor": "end" }, formatTick(value)));
  }
  for (const [value, anchor] of [[x0, "start"], [x1, "end"]]) {
    parts.push(draw("text", { class: "tick", x: x(value), y: height - 6, "text-anchor": anchor }, `${value === x1 ? `${step} ` : ""}${value}`));
  }
  parts.push(draw("path", { class: "curve", d: points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("") }));
  const last = points[points.length - 1];
  parts.push(draw("circle", { class: "end", cx: x(last[0]), cy: y(last[1]), r: 3 }));
  const label = `${name}: ${formatTick(ys[0])} → ${formatTick(last[1])}`;
  return draw("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, draw("title", {}, label), parts);
}

const formatTick = (value) => (value === 0 ? "0" : Math.abs(value) < 0.01 ? value.toExponential(0) : value.toPrecision(3).replace(/\.?0+$/, ""));
