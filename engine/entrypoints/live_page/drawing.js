"use strict";
// The lines and heat maps of the page, from what it has seen.

const HISTORY = 120; // events that are drawn, about 2 minutes
const MIN_LOG2 = -2, MAX_LOG2 = 3; // the scale ends at 1/4 and 8 times an equal share
// cividis: its lightness grows evenly, also for the colour-blind.
const COLOURS = [[0, 32, 77], [49, 68, 107], [102, 105, 112], [149, 143, 120], [203, 186, 105], [255, 234, 70]];
const FONT = "11px system-ui, 'DejaVu Sans', sans-serif";
const GUTTER = 34, AXIS = 16;

const byId = (id) => document.getElementById(id);
const timeline = []; // { at, tokens, step, queue, routes, load } of each event, the newest last
let chosenLayer = 0, shape = "";

function shortNumber(value) {
  if (value >= 1e6) return (value / 1e6).toFixed(1) + "M";
  if (value >= 1e4) return (value / 1e3).toFixed(1) + "k";
  return value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1);
}

const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function prepare(canvas, height) {
  if (height) canvas.style.height = height + "px";
  const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  const width = Math.round(box.width * ratio), rows = Math.round(box.height * ratio);
  if (canvas.width !== width || canvas.height !== rows) { canvas.width = width; canvas.height = rows; }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, box.width, box.height);
  return [pen, box.width, box.height];
}

function drawLine(id, key) {
  const [pen, width, height] = prepare(byId(id));
  const most = Math.max(...timeline.map((event) => event[key] || 0), 1e-9);
  const left = HISTORY - timeline.length;
  pen.strokeStyle = colourOf("--line");
  pen.strokeRect(0, height - 0.5, width, 0);
  pen.beginPath();
  let isDown = false;
  timeline.forEach((event, index) => {
    if (event[key] === null) { isDown = false; return; }
    const x = (left + index) / (HISTORY - 1) * width, y = height - 2 - event[key] / most * (height - 5);
    if (isDown) pen.lineTo(x, y); else pen.moveTo(x, y);
    isDown = true;
  });
  pen.strokeStyle = colourOf("--accent");
  pen.lineWidth = 1.5;
  pen.stroke();
  if (most < 1e-6) return;
  pen.font = FONT;
  pen.fillStyle = colourOf("--muted");
  pen.fillText("peak " + shortNumber(most), 0, 11);
}

function heat(times) {
  const log2 = times > 0 ? Math.log2(times) : MIN_LOG2;
  const at = Math.min(Math.max((log2 - MIN_LOG2) / (MAX_LOG2 - MIN_LOG2), 0), 1) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(at), COLOURS.length - 2);
  return `rgb(${COLOURS[low].map((part, i) => Math.round(part + (COLOURS[low + 1][i] - part) * (at - low))).join()})`;
}

function drawScale() {
  const [pen, width] = prepare(byId("scale"));
  const inner = width - 24;
  for (let x = 0; x < inner; x++) {
    pen.fillStyle = heat(2 ** (MIN_LOG2 + x / inner * (MAX_LOG2 - MIN_LOG2)));
    pen.fillRect(12 + x, 0, 1.5, 11);
  }
  pen.fillStyle = colourOf("--muted");
  pen.font = FONT;
  pen.textAlign = "center";
  ["≤¼×", "½×", "1×", "2×", "4×", "≥8×"].forEach((text, index) => pen.fillText(text, 12 + inner * index / 5, 25));
}

// Rows of cells over time; `timesOf(load, row)` is the multiple of an equal share.
function drawMap(id, labels, cellHeight, timesOf, marked) {
  const canvas = byId(id);
  const [pen, width, height] = prepare(canvas, labels.length * cellHeight + AXIS);
  const inner = width - GUTTER, cell = inner / HISTORY, bottom = labels.length * cellHeight;
  pen.fillStyle = colourOf("--empty");
  pen.fillRect(GUTTER, 0, inner, bottom);
  const left = HISTORY - timeline.length;
  timeline.forEach(({ load }, index) => {
    if (!load) return;
    for (let row = 0; row < labels.length; row++) {
      pen.fillStyle = heat(timesOf(load, row));
      pen.fillRect(GUTTER + (left + index) * cell, row * cellHeight, cell + 0.5, Math.max(cellHeight - (cellHeight > 6 ? 1 : 0), 1));
    }
  });
  pen.font = FONT;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const every = Math.ceil(13 / cellHeight);
  labels.forEach((label, row) => {
    if (row % every && row !== marked) return;
    pen.fillStyle = colourOf(row === marked ? "--accent" : "--muted");
    pen.fillText((row === marked ? "▸ " : "") + label, GUTTER - 5, row * cellHeight + cellHeight / 2);
  });
  pen.fillStyle = colourOf("--muted");
  pen.textBaseline = "alphabetic";
  for (const [text, align, x] of [["2 min ago", "left", GUTTER], ["1 min", "center", GUTTER + inner / 2], ["now", "right", width]]) {
    pen.textAlign = align;
    pen.fillText(text, x, height - 3);
  }
}

const shareOf = (load, layer, expert) => load.fair[layer] ? load.counts[layer * load.numExperts + expert] / load.fair[layer] : 0;

function lastLoad() {
  return timeline.findLast((event) => event.load)?.load;
}

function mapHeights(load) {
  const room = (rows, space) => Math.max(Math.min(Math.floor(space / rows), 14), 2);
  return [room(load.layers.length, 170), room(load.numExperts, 200)];
}

function drawMaps() {
  const load = lastLoad();
  byId("maps").hidden = !load;
  if (!load) return;
  const [layerHeight, expertHeight] = mapHeights(load);
  drawMap("layer-map", load.layers, layerHeight, (one, row) => one.busiest[row], chosenLayer);
  const experts = Array.from({ length: load.numExperts }, (_, expert) => expert);
  drawMap("expert-map", experts, expertHeight, (one, row) => shareOf(one, chosenLayer, row), -1);
  drawScale();
}

function draw() {
  drawLine("tokens-line", "tokens");
  drawLine("step-line", "step");
  drawLine("queue-line", "queue");
  drawLine("routes-line", "routes");
  drawMaps();
}
