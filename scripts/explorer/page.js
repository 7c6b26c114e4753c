// Data flows one way: state -> results (by the formulas above) -> page.

const PARTS = ["weights", "adapter", "gradients", "optimizer_state", "activations", "logits"];
const PART_NAMES = { weights: "base weights", optimizer_state: "optimizer state" };
const METHODS = { "full": "full fine-tuning", "LoRA": "LoRA", "LoRA, int8": "LoRA, int8 base", "LoRA, NF4": "LoRA, NF4 base" };
const FIELDS = ["model", "kernel", "targets", "precision", "optimizer", "rows", "length"];
const START = { model: "llama-2-7b", kernel: "layers/attn/q_proj/kernel", targets: "all-linear", precision: "2", optimizer: "adamw", rows: "4", length: "1024", remat: "1", rank: "8" };

const nameOf = (part) => PART_NAMES[part] ?? part;
const at = (id) => document.getElementById(id);
const shapes = Object.fromEntries(MODELS.map((raw) => [raw.name, new ModelShape({ ...raw, kernels: raw.kernels.map((k) => new KernelShape(k)) })]));

// --- formatting --------------------------------------------------------------------------------

const exact = (count) => count.toLocaleString("en-US");

function scaled(count, names) {
  let power = 0;
  // 999.6 would be formatted as 1.00e+3.
  while (count / 1000 ** power >= 999.5 && power < names.length - 1) power += 1;
  const value = count / 1000 ** power;
  const text = power === 0 || value >= 99.95 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
  return `${text} ${names[power]}`.trim();
}
const bytes = (count) => scaled(count, ["B", "kB", "MB", "GB", "TB", "PB"]);
const counted = (count) => scaled(count, ["", "k", "M", "G", "T", "P", "E", "Z", "Y"]);

function percent(share) {
  const value = 100 * share;
  return value === 0 || value >= 0.1 ? `${value.toFixed(2)}%` : `${Number(value.toPrecision(2))}%`;
}

// --- the state ---------------------------------------------------------------------------------

let state = { ...START };

function settle(wanted) {
  // Input from controls, presets and the URL may be invalid; replace it with valid values.
  const next = { ...state, ...wanted };
  if (!shapes[next.model]) next.model = START.model;
  const dense = shapes[next.model].kernels.filter((k) => k.kind === "dense");
  if (!dense.some((k) => k.path === next.kernel)) next.kernel = (dense.find((k) => k.targets.includes("q and v")) ?? dense[0]).path;
  if (!TARGETS.includes(next.targets)) next.targets = START.targets;
  if (!["2", "4"].includes(next.precision)) next.precision = START.precision;
  if (!(next.optimizer in STATE_SIZE)) next.optimizer = START.optimizer;
  next.rows = whole(next.rows, 1, 4096);
  next.length = whole(next.length, 1, 1048576);
  next.remat = next.remat === "1" ? "1" : "0";
  next.rank = whole(next.rank, 1, largestRank(next));
  return next;
}

function whole(text, least, most) {
  const value = Math.round(Number(text));
  return String(Number.isFinite(value) ? Math.min(most, Math.max(least, value)) : least);
}

const kernelOf = ({ model, kernel }) => shapes[model].kernels.find((k) => k.path === kernel);
const largestRank = (of) => { const k = kernelOf(of); return Math.min(k.inputs, k.outputs); };

function stops(most) {
  // 1, 2, 3, 4, 6, 8, 12, 16, ...: a logarithmic scale, so every doubling has the same length.
  const found = [];
  for (let power = 1; power <= most; power *= 2) found.push(power, ...(power > 1 && power * 1.5 <= most ? [power * 1.5] : []));
  return [...new Set([...found, most])].sort((x, y) => x - y);
}

// --- the results -------------------------------------------------------------------------------

function compute(of) {
  const shape = shapes[of.model], rank = Number(of.rank), length = Number(of.length);
  const adapted = shape.kernels.filter((k) => k.targets.includes(of.targets));
  const trained = adapter_size(adapted, rank);
  const step = new Step({ batch_size: Number(of.rows), length, targets: length, remat: of.remat === "1" });
  const method = new Method({ shape, adapted, rank, trainable: trained, itemsize: Number(of.precision), optimizer: of.optimizer });
  return { shape, trained, method, columns: side_by_side(method, step), kernel: kernelOf(of), rank };
}

// --- the page ----------------------------------------------------------------------------------

function show() {
  const numbers = compute(state);
  showChoices();
  showKernel(numbers);
  showFacts(numbers);
  showMemory(numbers.columns);
  document.documentElement.dataset.numbers = JSON.stringify({ trained: numbers.trained, columns: numbers.columns });
  history.replaceState(null, "", "#" + new URLSearchParams(state));
}

function options(select, entries, chosen) {
  const key = JSON.stringify(entries);
  if (select.dataset.key !== key) {
    select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
    select.dataset.key = key;
  }
  select.value = chosen;
}

function showChoices() {
  const dense = shapes[state.model].kernels.filter((k) => k.kind === "dense");
  options(at("model"), MODELS.map(({ name }) => [name, name]), state.model);
  options(at("kernel"), dense.map((k) => [k.path, `${k.path.replace(/^layers\/|\/kernel$/g, "")}  (${k.inputs}, ${k.outputs})`]), state.kernel);
  options(at("targets"), TARGETS.map((each) => [each, each]), state.targets);
  options(at("optimizer"), Object.keys(STATE_SIZE).map((each) => [each, each]), state.optimizer);
  for (const field of ["precision", "rows", "length"]) at(field).value = state[field];
  at("remat").checked = state.remat === "1";
  const all = stops(largestRank(state)), rank = Number(state.rank);
  at("rank").max = all.length - 1;
  at("rank").value = all.findLastIndex((each) => each <= rank);
  at("rank").setAttribute("aria-valuetext", `rank ${rank}`);
  at("rank-number").max = largestRank(state);
  at("rank-number").value = rank;
}

function showKernel({ kernel, rank }) {
  const { inputs, outputs } = kernel;
  const pair = pair_size(inputs, outputs, rank), whole = inputs * outputs, spared = reduction(inputs, outputs, rank);
  const words = spared > 0 ? `${percent(spared)} fewer` : spared === 0 ? "no reduction" : `${percent(-spared)} more`;
  at("headline").innerHTML = `${exact(pair)} parameters instead of ${exact(whole)}: <span class="${spared > 0 ? "less" : "more"}">${words}</span>`;
  at("headline").dataset.value = JSON.stringify([pair, whole, spared]);
  draw(inputs, outputs, rank);
  const copies = kernel.count > 1 ? `, one of ${exact(kernel.count)} with this shape` : "";
  at("picture-words").textContent = `To scale: W0 is (${exact(inputs)}, ${exact(outputs)})${copies}; a is (${exact(inputs)}, ${exact(rank)}), b is (${exact(rank)}, ${exact(outputs)}).`;
}

function draw(inputs, outputs, rank) {
  // All three share one scale. The view box is narrower on a phone, to keep the labels readable.
  const narrow = at("picture").clientWidth < 520, box = narrow ? 460 : 900, gap = narrow ? 26 : 56, tall = narrow ? 210 : 300;
  const scale = Math.min((box - 2 * gap) / (2 * outputs + rank), tall / inputs);
  const w = outputs * scale, h = inputs * scale, thin = rank * scale;
  const seen = Math.max(thin, 1); // at least one pixel
  const xa = w + gap, xb = xa + seen + gap;
  const height = h + 46;
  const label = (x, y, words, cls, anchor) => `<text x="${x}" y="${y}" class="${cls}" text-anchor="${anchor}">${words}</text>`;
  at("picture").setAttribute("viewBox", `0 0 ${box} ${Math.max(height, 90)}`);
  at("picture").innerHTML =
    `<rect class="w" width="${w}" height="${h}" rx="2"/><rect class="a" x="${xa}" width="${seen}" height="${h}"/><rect class="b" x="${xb}" width="${w}" height="${seen}"/>` +
    label(0, h + 20, `W0: ${exact(inputs)} × ${exact(outputs)}, frozen`, "", "start") +
    label(xa + seen / 2, w > 230 ? h + 20 : h + 40, `a: ${exact(inputs)} × ${exact(rank)}`, "a", "middle") +
    label(xb + w / 2, Math.min(seen + 20, h + 20), `b: ${exact(rank)} × ${exact(outputs)}`, "b", "middle");
}

function fact(id, value, text) {
  at(id).textContent = text;
  at(id).dataset.value = value;
}

function showFacts({ shape, trained, method, columns }) {
  fact("trained", trained, exact(trained));
  fact("share", trained / shape.size, `${percent(trained / shape.size)} of ${exact(shape.size)}`);
  fact("adapter-size", trained * ADAPTER_BYTES, bytes(trained * ADAPTER_BYTES));
  fact("model-size", shape.size * method.itemsize, `the full model: ${bytes(shape.size * method.itemsize)}`);
  fact("flops", columns.LoRA.flops, counted(columns.LoRA.flops));
  fact("flops-share", columns.LoRA.flops / columns.full.flops, `${percent(columns.LoRA.flops / columns.full.flops)} of full fine-tuning`);
}

function showMemory(columns) {
  const most = Math.max(...Object.values(columns).map((each) => each.total));
  const rows = Object.entries(columns).map(([name, each]) => {
    const said = PARTS.filter((part) => each[part]).map((part) => `${nameOf(part)} ${bytes(each[part])}`).join(", ");
    const widths = PARTS.map((part) => `<span class="${part}" style="width:${(100 * each[part]) / each.total}%" title="${nameOf(part)}: ${bytes(each[part])}"></span>`);
    return `<div class="bar" role="listitem" aria-label="${METHODS[name]}: ${bytes(each.total)}; ${said}"><span class="name">${METHODS[name]}</span>` +
      `<span class="track"><span class="stack" style="width:calc((100% - 5.5rem) * ${each.total / most})">${widths.join("")}</span>` +
      `<span class="total" data-method="${name}" data-value="${each.total}">${bytes(each.total)}</span></span></div>`;
  });
  at("bars").innerHTML = rows.join("");
  at("legend").innerHTML = PARTS.map((part) => `<li><i class="${part}"></i>${nameOf(part)}</li>`).join("");
  const head = `<thead><tr><th scope="col"></th>${Object.keys(columns).map((name) => `<th scope="col">${METHODS[name]}</th>`).join("")}</tr></thead>`;
  const body = [...PARTS, "total"].map((part) => `<tr><th scope="row">${nameOf(part)}</th>${Object.values(columns).map((each) => `<td>${each[part] ? bytes(each[part]) : "–"}</td>`).join("")}</tr>`);
  at("table").innerHTML = `${head}<tbody>${body.join("")}</tbody>`;
}

// --- input -------------------------------------------------------------------------------------

function change(wanted) {
  state = settle(wanted);
  show();
}

for (const field of FIELDS) at(field).addEventListener("change", (event) => change({ [field]: event.target.value }));
at("remat").addEventListener("change", (event) => change({ remat: event.target.checked ? "1" : "0" }));
at("rank").addEventListener("input", (event) => change({ rank: String(stops(largestRank(state))[event.target.value]) }));
at("rank-number").addEventListener("change", (event) => change({ rank: event.target.value }));
for (const button of document.querySelectorAll("[data-set]")) button.addEventListener("click", () => change(Object.fromEntries(new URLSearchParams(button.dataset.set))));
addEventListener("hashchange", () => change(Object.fromEntries(new URLSearchParams(location.hash.slice(1)))));
addEventListener("resize", () => { const { kernel, rank } = compute(state); draw(kernel.inputs, kernel.outputs, rank); });
change(Object.fromEntries(new URLSearchParams(location.hash.slice(1))));
