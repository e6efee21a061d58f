"use strict";

const $ = (id) => document.getElementById(id);
let latest = 0; // an answer to an earlier choice of images is dropped

$("files").addEventListener("change", () => show([...$("files").files]));
addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  show([...event.dataTransfer.files]);
});
$("key").addEventListener("change", about);
about();

function ask(path, options = {}) {
  const key = $("key").value.trim();
  return fetch(path, { ...options, headers: key ? { Authorization: `Bearer ${key}` } : {} });
}

async function about() {
  try {
    const answer = await ask("v1/models");
    if (answer.status === 401) document.querySelector("details").open = true;
    const content = await answer.json();
    $("model").textContent = answer.ok ? content.data.map((model) => model.id).join(", ") : content.error.message;
    if (answer.status === 503) setTimeout(about, 1000);
  } catch {
    $("model").textContent = "the server does not answer";
  }
}

async function show(files) {
  if (!files.length) return;
  const turn = ++latest;
  const chosen = files.slice(0, 2);
  const cards = chosen.map(card);
  for (const image of document.querySelectorAll("#images img")) URL.revokeObjectURL(image.src);
  $("images").replaceChildren(...cards);
  $("error").hidden = $("similarity").hidden = true;
  const done = await Promise.allSettled(chosen.map(embed));
  if (turn !== latest) return;
  const failed = done.flatMap((result, i) =>
    result.status === "rejected" ? [`${chosen[i].name}: ${result.reason.message}`] : []);
  if (files.length > 2) failed.push("The first two images are shown.");
  $("error").textContent = failed.join("\n");
  $("error").hidden = !failed.length;
  done.forEach((result, i) => { if (result.status === "rejected") cards[i].remove(); });
  const found = done.flatMap((result, i) => (result.status === "fulfilled" ? [{ ...result.value, card: cards[i] }] : []));
  paint(found);
  for (const one of found) describe(one);
  if (found.length === 2) {
    $("similarity").textContent = `Cosine similarity of the summaries: ${cosine(found[0].summary, found[1].summary).toFixed(4)}`;
    $("similarity").hidden = false;
  }
}

function card(file) {
  const node = $("card").content.firstElementChild.cloneNode(true);
  node.querySelector("h2").textContent = file.name;
  node.querySelector("img").src = URL.createObjectURL(file);
  return node;
}

async function embed(file) {
  const form = new FormData();
  form.append("images", file);
  const start = performance.now();
  let answer;
  try {
    answer = await ask("embed?output=both", { method: "POST", body: form });
  } catch {
    throw new Error("the server does not answer");
  }
  if (!answer.ok) {
    const content = await answer.json().catch(() => null);
    throw new Error(content?.error?.message ?? `status ${answer.status}`);
  }
  const bytes = await answer.arrayBuffer();
  return { ...read(bytes), milliseconds: performance.now() - start, timing: answer.headers.get("Server-Timing") ?? "" };
}

// Safetensors: the header's length in 8 bytes, a header in JSON, the arrays.
function read(bytes) {
  const start = 8 + Number(new DataView(bytes).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 8, start - 8)));
  const array = (name) => new Float32Array(bytes.slice(...header[name].data_offsets.map((offset) => start + offset)));
  const [rows, columns, width] = header["0.features"].shape;
  return { summary: array("0.summary"), features: array("0.features"), rows, columns, width, size: header.__metadata__["0.size"] };
}

function describe({ card, rows, columns, width, summary, size, milliseconds, timing }) {
  const parts = Object.fromEntries([...timing.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, ms]) => [name, `${Number(ms).toFixed(1)} ms`]));
  const image = card.querySelector("img");
  if (image.naturalWidth) card.querySelector("canvas").style.aspectRatio = image.naturalWidth / image.naturalHeight;
  const pixels = image.naturalWidth ? `${image.naturalWidth} × ${image.naturalHeight} pixels` : "not shown by this browser";
  const [height, across] = size.split("x");
  const facts = {
    "Image": pixels,
    "Model saw": `${across} × ${height} pixels`,
    "Features": `${columns} × ${rows}, ${width} wide`,
    "Summary": `${summary.length} wide`,
    "Round trip": `${milliseconds.toFixed(0)} ms`,
    "Server": `decode ${parts.decode}, wait ${parts.wait}, model ${parts.compute}`,
  };
  card.querySelector("dl").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => {
    const [term, text] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, text.textContent] = [name, value];
    return [term, text];
  }));
}

// The three main components of all images' features together, so that a colour means the same in each.
function paint(found) {
  if (!found.length) return;
  const width = found[0].width;
  const rows = found.flatMap(({ features, rows, columns }) =>
    Array.from({ length: rows * columns }, (_, i) => features.subarray(i * width, (i + 1) * width)));
  const mean = new Float64Array(width);
  for (const row of rows) for (let d = 0; d < width; d++) mean[d] += row[d] / rows.length;
  const channels = [];
  const axes = [];
  for (let k = 0; k < 3; k++) {
    axes.push(axis(rows, mean, axes, k));
    channels.push(spread(rows.map((row) => along(row, mean, axes[k]))));
  }
  let first = 0;
  for (const { card, rows: height, columns } of found) {
    const canvas = card.querySelector("canvas");
    [canvas.width, canvas.height] = [columns, height];
    const picture = new ImageData(columns, height);
    for (let i = 0; i < columns * height; i++) {
      picture.data.set([...channels.map((channel) => channel[first + i]), 255], 4 * i);
    }
    canvas.getContext("2d").putImageData(picture, 0, 0);
    first += columns * height;
  }
}

// Power iteration: a main component, at right angles to those before it.
function axis(rows, mean, before, seed) {
  let v = Float64Array.from(mean, (_, d) => Math.sin(1 + d * (seed + 1)));
  for (let step = 0; step < 12; step++) {
    const next = new Float64Array(v.length);
    for (const row of rows) {
      const a = along(row, mean, v);
      for (let d = 0; d < v.length; d++) next[d] += a * (row[d] - mean[d]);
    }
    for (const other of before) {
      const a = dot(next, other);
      for (let d = 0; d < v.length; d++) next[d] -= a * other[d];
    }
    const norm = Math.sqrt(dot(next, next)) || 1;
    v = next.map((x) => x / norm);
  }
  return v;
}

function along(row, mean, v) {
  let sum = 0;
  for (let d = 0; d < v.length; d++) sum += (row[d] - mean[d]) * v[d];
  return sum;
}

// To 0…255, outliers cut off.
function spread(values) {
  const sorted = Float64Array.from(values).sort();
  const [low, high] = [0.01, 0.99].map((part) => sorted[Math.round(part * (sorted.length - 1))]);
  return values.map((value) => Math.max(0, Math.min(255, 255 * (value - low) / (high - low || 1))));
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

function cosine(a, b) {
  return dot(a, b) / (Math.sqrt(dot(a, a) * dot(b, b)) || 1);
}
