"use strict";
const panel = JSON.parse(document.getElementById("panel").textContent);
const colors = panel.colors.match(/../g).map((pair) => parseInt(pair, 16));
const figures = [...document.querySelectorAll(".click")];
const chosen = { model: panel.models.length - 1, image: 0, row: 0, column: 0 };

// rows: int8 (patches of all photographs, width); starts: first row of each photograph
for (const model of panel.models) {
  const text = atob(model.rows);
  const bytes = new Uint8Array(text.length);
  for (let n = 0; n < text.length; n++) bytes[n] = text.charCodeAt(n);
  model.values = new Int8Array(bytes.buffer);
  model.starts = [0];
  for (const [height, width] of model.grids) model.starts.push(model.starts.at(-1) + height * width);
  model.norms = new Float32Array(model.starts.at(-1));
  for (let row = 0; row < model.norms.length; row++) model.norms[row] = Math.sqrt(product(model, row, row)) || 1;
}

function product(model, one, other) {
  let sum = 0;
  const width = model.width, a = one * width, b = other * width;
  for (let n = 0; n < width; n++) sum += model.values[a + n] * model.values[b + n];
  return sum;
}

// cosine of the chosen patch with every patch of a photograph, row by row
function similarities(image) {
  const model = panel.models[chosen.model];
  const patch = model.starts[chosen.image] + chosen.row * model.grids[chosen.image][1] + chosen.column;
  const found = new Float32Array(model.starts[image + 1] - model.starts[image]);
  for (let n = 0; n < found.length; n++) {
    const row = model.starts[image] + n;
    found[n] = product(model, patch, row) / (model.norms[patch] * model.norms[row]);
  }
  return found;
}

function floor(values) {
  const sorted = Float32Array.from(values).sort();
  const low = sorted[Math.floor(0.01 * (sorted.length - 1))];
  return Math.max(-1, Math.min(0.95, Math.floor(low * 20) / 20));
}

function draw() {
  const own = similarities(chosen.image), low = floor(own);
  const mix = Number(document.getElementById("mix").value) * 2.55;
  figures.forEach((figure, image) => {
    const [height, width] = panel.models[chosen.model].grids[image];
    const values = image === chosen.image ? own : similarities(image);
    const canvas = figure.querySelector("canvas");
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d"), pixels = context.createImageData(width, height);
    values.forEach((value, n) => {
      const level = Math.round(255 * Math.min(1, Math.max(0, (value - low) / (1 - low))));
      for (let c = 0; c < 3; c++) pixels.data[4 * n + c] = colors[3 * level + c];
      pixels.data[4 * n + 3] = mix;
    });
    context.putImageData(pixels, 0, 0);
    const ring = figure.querySelector(".ring");
    ring.hidden = image !== chosen.image;
    ring.style.left = `${(100 * (chosen.column + 0.5)) / width}%`;
    ring.style.top = `${(100 * (chosen.row + 0.5)) / height}%`;
    const best = values.reduce((most, value, n) => (image === chosen.image && value > 0.9999 ? most : Math.max(most, value)), -1);
    figure.querySelector("figcaption").textContent = `${panel.images[image].name}, most similar ${best.toFixed(2)}`;
  });
  document.getElementById("low").textContent = low.toFixed(2);
  document.getElementById("said").textContent =
    `${panel.images[chosen.image].name}: row ${chosen.row + 1}, column ${chosen.column + 1}`;
}

function select(image, row, column) {
  const [height, width] = panel.models[chosen.model].grids[image];
  chosen.image = image;
  chosen.row = Math.min(height - 1, Math.max(0, row));
  chosen.column = Math.min(width - 1, Math.max(0, column));
  draw();
}

figures.forEach((figure, image) => {
  const canvas = figure.querySelector("canvas");
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect(), [height, width] = panel.models[chosen.model].grids[image];
    const row = Math.floor(((event.clientY - box.top) / box.height) * height);
    select(image, row, Math.floor(((event.clientX - box.left) / box.width) * width));
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    if (chosen.image === image) select(image, chosen.row + move[0], chosen.column + move[1]);
    else select(image, 0, 0);
  });
});
document.getElementById("mix").addEventListener("input", draw);
for (const input of document.querySelectorAll("input[name=model]"))
  input.addEventListener("change", () => {
    chosen.model = Number(input.value);
    select(chosen.image, chosen.row, chosen.column);
  });

const scale = document.getElementById("scale").getContext("2d"), ramp = scale.createImageData(256, 1);
for (let n = 0; n < 256; n++) {
  for (let c = 0; c < 3; c++) ramp.data[4 * n + c] = colors[3 * n + c];
  ramp.data[4 * n + 3] = 255;
}
scale.putImageData(ramp, 0, 0);
const [rows, columns] = panel.models[0].grids[0];
select(0, Math.floor(rows / 2), Math.floor(columns / 2));
