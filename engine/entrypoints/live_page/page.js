"use strict";
// The page at `/`: reads one event a second (fields: live_event.py) and draws it. What comes from the server is put into the page
// as text, never as HTML. Needs drawing.js.

const KEPT_HIDDEN_MS = 60000;
const MAX_RETRY_MS = 10000;

// --- text -------------------------------------------------------------------------------------------------------------

function setText(id, text) {
  const place = byId(id);
  if (place.textContent !== String(text)) place.textContent = text;
}

function milliseconds(value) {
  return value === null ? "–" : value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

function fillRows(id, rows) {
  byId(id).replaceChildren(...rows.map(({ cells, mark }) => {
    const row = document.createElement("tr");
    if (mark) row.className = mark;
    for (const [text, kind] of cells) {
      const cell = document.createElement("td");
      cell.textContent = text;
      if (kind) cell.className = kind;
      if (kind && kind.includes("rid")) cell.title = text;
      row.append(cell);
    }
    return row;
  }));
}

// --- events -----------------------------------------------------------------------------------------------------------

function decodeLoad(load) {
  if (!load) return null;
  const bytes = Uint8Array.from(atob(load.counts), (char) => char.charCodeAt(0));
  const view = new DataView(bytes.buffer), counts = new Uint16Array(bytes.length / 2);
  for (let i = 0; i < counts.length; i++) counts[i] = view.getUint16(2 * i, true);
  const fair = [], busiest = [];
  load.layer_ids.forEach((_, layer) => {
    const row = counts.subarray(layer * load.num_experts, (layer + 1) * load.num_experts);
    fair.push(row.reduce((sum, count) => sum + count, 0) / load.num_experts);
    busiest.push(fair[layer] ? Math.max(...row) / fair[layer] : 0);
  });
  return { layers: load.layer_ids, numExperts: load.num_experts, rows: load.num_rows, counts, fair, busiest };
}

function showLayers(load) {
  if (shape === load.layers.join()) return;
  shape = load.layers.join();
  chosenLayer = 0;
  byId("layer").replaceChildren(...load.layers.map((layer, index) => new Option(layer, index)));
}

function showRanks(engine) {
  const worst = engine.ranks.reduce((a, b) => (b.delays_ms > a.delays_ms ? b : a));
  fillRows("ranks", engine.ranks.map((rank) => ({
    mark: rank === worst && rank.delays_ms >= 50 ? "straggler" : "",
    cells: [
      [rank.dp_rank], [rank.running], [rank.queued], [Math.round(100 * (1 - rank.free_pages / rank.pages)) + " %"],
      [milliseconds(rank.step_ms)], [milliseconds(rank.max_step_ms), "wide"], [engine.ranks.length > 1 ? milliseconds(rank.delays_ms) : "–"],
    ],
  })));
  setText("no-waits", engine.ranks.length < 2 ? "One dp rank: nobody to wait for." : engine.waits.length ? "" : "Nobody waits.");
  byId("waits").replaceChildren(...engine.waits.slice(0, 5).map((wait) => {
    const item = document.createElement("li"), who = document.createElement("span"), how = document.createElement("span");
    who.textContent = `rank ${wait.rank} for ${wait.straggler}: ${wait.cause.replaceAll("_", " ")}`;
    how.textContent = `${milliseconds(wait.ms)} ms/s`;
    item.append(who, how);
    return item;
  }));
}

function showRequests(requests) {
  byId("no-requests").hidden = requests.length > 0;
  fillRows("requests", requests.slice(0, 10).map((one) => ({
    cells: [
      [one.rid, "text rid"],
      [one.has_routes_error ? one.outcome + ", no routes" : one.outcome,
        ["stop", "length"].includes(one.outcome) && !one.has_routes_error ? "text" : "text failed"],
      [one.prompt_tokens, "wide"], [one.cached_tokens, "wide"], [one.completion_tokens], [one.seconds.toFixed(2)],
    ],
  })));
}

function showEngine(engine) {
  const total = (key) => engine.ranks.reduce((sum, rank) => sum + rank[key], 0);
  const stepping = engine.ranks.filter((rank) => rank.step_ms !== null);
  const step = stepping.length ? Math.max(...stepping.map((rank) => rank.step_ms)) : null;
  const pages = total("pages"), free = total("free_pages"), cached = total("cached_pages"), held = pages - free - cached;
  const load = decodeLoad(engine.expert_load), routes = engine.routes;
  setText("version", engine.weight_version);
  setText("tokens", shortNumber(engine.tokens_per_s));
  setText("step", milliseconds(step));
  setText("running", total("running"));
  setText("queued", total("queued"));
  setText("held", `${shortNumber(held)} of ${shortNumber(pages)}`);
  setText("cached", shortNumber(cached));
  setText("free", shortNumber(free));
  byId("pages").ariaLabel = `${held} pages held, ${cached} cached, ${free} free`;
  for (const [kind, amount] of [["held", held], ["cached", cached]]) byId("pages").querySelector("." + kind).style.width = 100 * amount / pages + "%";
  setText("shipped", shortNumber(routes.rows_shipped_per_s));
  setText("routes-more", routes.is_enabled
    ? `${shortNumber(routes.rows_shipped)} in all, ${routes.refused} refused; ring ${routes.ring_occupied}/${routes.ring_slots}` : "routing is not recorded");
  setText("sample", load ? `a sample of ${load.rows} tokens in the last second` : "");
  setText("no-load", routes.is_enabled ? "No tokens were routed while this page was open."
    : "Routes are not recorded: start the server with --enable-return-routed-experts.");
  if (load) showLayers(load);
  showRanks(engine);
  timeline.push({ tokens: engine.tokens_per_s, step, queue: total("running") + total("queued"), routes: routes.rows_shipped_per_s, load });
  if (timeline.length > HISTORY) timeline.shift();
  byId("no-load").hidden = Boolean(lastLoad());
}

function showEvent(event) {
  setText("model", event.model);
  setText("layout", `${event.dp_size} dp × ${event.tp_size} tp`);
  document.title = `${event.model} · Waybill`;
  if (event.engine) {
    setState(event.engine.state, event.engine.reason);
    showEngine(event.engine);
  } else {
    setState("lost", event.reason);
  }
  showRequests(event.requests);
  draw();
}

function setState(state, notice) {
  const badge = byId("state");
  badge.className = "badge " + state;
  setText("state", state === "lost" ? "no answer" : state);
  byId("notice").hidden = !notice;
  setText("notice", notice || "");
  document.body.classList.toggle("stale", state === "lost");
}

// --- connection -------------------------------------------------------------------------------------------------------

let connection = null, retryMs = 1000, retry = 0;

function headersWithKey() {
  const key = sessionStorage.getItem("waybill-key");
  // A header holds bytes; those of the key are UTF-8.
  return key ? { Authorization: "Bearer " + String.fromCharCode(...new TextEncoder().encode(key)) } : {};
}

async function readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      retryMs = 1000;
      showEvent(JSON.parse(data));
    }
  }
}

async function connect() {
  clearTimeout(retry);
  connection?.abort();
  const mine = connection = new AbortController();
  let reason = "The server has closed the connection.";
  try {
    const reply = await fetch("events", { headers: headersWithKey(), signal: mine.signal, cache: "no-store" });
    if (reply.status === 401) { askForKey(); return; }
    if (reply.ok) await readEvents(reply.body);
    else reason = (await reply.json()).error.message;
  } catch (error) {
    if (mine.signal.aborted) return;
    reason = "The server cannot be reached.";
  }
  setState("lost", `${reason} Trying again.`);
  retry = setTimeout(connect, retryMs);
  retryMs = Math.min(2 * retryMs, MAX_RETRY_MS);
}

function askForKey() {
  setState("lost", "");
  setText("state", "locked");
  if (sessionStorage.getItem("waybill-key")) setText("ask-why", "The server does not take this key.");
  byId("ask").showModal();
}

// --- controls ---------------------------------------------------------------------------------------------------------

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  setText("theme", theme === "dark" ? "Light" : "Dark");
  draw();
}

function systemTheme() {
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

function pointAt(event, isLayers) {
  const load = lastLoad(), box = event.target.getBoundingClientRect();
  const row = Math.floor((event.clientY - box.top) / mapHeights(load)[isLayers ? 0 : 1]);
  const column = Math.floor((event.clientX - box.left - GUTTER) / (box.width - GUTTER) * HISTORY);
  return { load: timeline[column - (HISTORY - timeline.length)]?.load, row, ago: HISTORY - 1 - column };
}

function listen() {
  byId("ask-form").addEventListener("submit", () => {
    sessionStorage.setItem("waybill-key", byId("key").value);
    byId("key").value = "";
    connect();
  });
  byId("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("waybill-theme", theme);
    setTheme(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(localStorage.getItem("waybill-theme") || systemTheme()));
  byId("layer").addEventListener("change", (event) => { chosenLayer = Number(event.target.value); drawMaps(); });
  byId("layer-map").addEventListener("click", (event) => {
    const { row } = pointAt(event, true);
    if (row < lastLoad().layers.length) { chosenLayer = row; byId("layer").value = row; drawMaps(); }
  });
  for (const id of ["layer-map", "expert-map"]) {
    byId(id).addEventListener("mousemove", (event) => {
      const { load, row, ago } = pointAt(event, id === "layer-map");
      if (!load) return;
      if (id === "layer-map" && row < load.layers.length) {
        setText("pointed", `Layer ${load.layers[row]}, ${ago} s ago: its busiest expert had ${load.busiest[row].toFixed(2)}× an equal share.`);
      } else if (id === "expert-map" && row < load.numExperts) {
        setText("pointed", `Layer ${load.layers[chosenLayer]}, expert ${row}, ${ago} s ago: ${shareOf(load, chosenLayer, row).toFixed(2)}× an equal share.`);
      }
    });
  }
  window.addEventListener("resize", draw);
  // A page that nobody sees costs the server nothing.
  let leaving = 0;
  document.addEventListener("visibilitychange", () => {
    clearTimeout(leaving);
    if (document.hidden) leaving = setTimeout(() => { connection?.abort(); connection = null; clearTimeout(retry); }, KEPT_HIDDEN_MS);
    else if (connection === null) connect();
  });
}

listen();
setTheme(localStorage.getItem("waybill-theme") || systemTheme());
connect();
