// The page of BoxEditor (box_editor.py), behind layer_editor.js.
//
// In reading order: 1 geometry · 2 masks · 3 the document as text · 4 the editor.
//
// Each layer has a `box` or a `mask`, and what else a Layer of Python has.

// ------------------------------------------------------------------ 1 geometry

const HANDLES = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];
const MIDDLE = [0.3, 0.3, 0.7, 0.7]; // where a layer without a gesture begins
const LEAST = 0.01; // smallest side of a box, as a fraction of the canvas
const tidy = (value) => Math.round(value * 1e4) / 1e4; // a tenth of a thousandth is enough
const inside = ([x, y], [x0, y0, x1, y1]) => x >= x0 && x <= x1 && y >= y0 && y <= y1;
const LETTER = 6.6; // how wide a letter of a label is, in SVG units

/** The box moved by (dx, dy), kept on the canvas. */
function moved([x0, y0, x1, y1], dx, dy) {
  dx = clamp(dx, -x0, 1 - x1);
  dy = clamp(dy, -y0, 1 - y1);
  return [x0 + dx, y0 + dy, x1 + dx, y1 + dy];
}

/** The box with the edges of `handle` ("n", "se", …) moved by (dx, dy); it never turns over. */
function resized([x0, y0, x1, y1], handle, dx, dy, least) {
  if (handle.includes("w")) x0 = clamp(x0 + dx, 0, x1 - least[0]);
  if (handle.includes("e")) x1 = clamp(x1 + dx, x0 + least[0], 1);
  if (handle.includes("n")) y0 = clamp(y0 + dy, 0, y1 - least[1]);
  if (handle.includes("s")) y1 = clamp(y1 + dy, y0 + least[1], 1);
  return [x0, y0, x1, y1];
}

// ------------------------------------------------------------------ 2 masks

/** Masks as pictures: PNG data URIs, of which pixels white and opaque are "yes". */
class Masks {
  constructor(width, height, onready) {
    const scale = 256 / Math.max(width, height);
    this.width = Math.max(1, Math.round(width * scale));
    this.height = Math.max(1, Math.round(height * scale));
    this.onready = onready;
    this.known = new Map(); // data URI → {canvas, box}, or null while it is decoded
  }

  /** {canvas, box} of a mask; null if it is not decoded yet, then `onready` is called later. */
  get(uri) {
    if (!this.known.has(uri)) {
      this.known.set(uri, null);
      const image = new Image();
      image.onload = () => {
        const canvas = this.canvas((c) => c.drawImage(image, 0, 0, this.width, this.height));
        this.remember(uri, canvas);
        this.onready();
      };
      image.src = uri;
    }
    return this.known.get(uri);
  }

  canvas(paint) {
    const canvas = h("canvas", { width: this.width, height: this.height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = context.strokeStyle = "#fff";
    context.imageSmoothingEnabled = false;
    paint(context);
    return canvas;
  }

  /** Note the mask's tight box, and make the canvas itself white on nothing. */
  remember(uri, canvas) {
    const context = canvas.getContext("2d");
    const pixels = context.getImageData(0, 0, this.width, this.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const yes = pixels.data[i + 3] > 127 && pixels.data[i] > 127;
      pixels.data.fill(yes ? 255 : 0, i, i + 4);
    }
    const box = tightBox(this.width, this.height, (i) => pixels.data[4 * i]);
    if (!box) return null; // nothing in it
    context.putImageData(pixels, 0, 0);
    uri ??= canvas.toDataURL();
    this.known.set(uri, { canvas, box });
    if (this.known.size > 60) this.known.delete(this.known.keys().next().value);
    return uri;
  }

  /** The mask of `layer` (null: none yet) with a stroke added or erased; null if nothing is left. */
  painted(layer, points, breadth, erase) {
    return this.remember(null, this.canvas((c) => {
      if (layer?.mask) c.drawImage(this.get(layer.mask).canvas, 0, 0);
      if (layer?.box) {
        const [x0, y0, x1, y1] = layer.box;
        c.fillRect(x0 * this.width, y0 * this.height, (x1 - x0) * this.width, (y1 - y0) * this.height);
      }
      if (erase) c.globalCompositeOperation = "destination-out";
      c.lineCap = c.lineJoin = "round";
      c.lineWidth = breadth * Math.max(this.width, this.height);
      c.beginPath();
      for (const [x, y] of points) c.lineTo(x * this.width, y * this.height);
      c.stroke();
      // A line of no length is not drawn by every browser: a dot is a disc.
      c.beginPath();
      c.arc(points[0][0] * this.width, points[0][1] * this.height, c.lineWidth / 2, 0, 2 * Math.PI);
      c.fill();
    }));
  }

  /** The ellipse that touches all sides of a box. */
  ellipse([x0, y0, x1, y1]) {
    const { width: w, height: t } = this;
    return this.remember(null, this.canvas((c) => {
      c.ellipse((x0 + x1) / 2 * w, (y0 + y1) / 2 * t, (x1 - x0) / 2 * w, (y1 - y0) / 2 * t, 0, 0, 2 * Math.PI);
      c.fill();
    }));
  }

  /** The mask moved and stretched so that its tight box becomes `box`. */
  fitted(uri, box) {
    const { canvas, box: [u0, v0, u1, v1] } = this.get(uri);
    const [x0, y0, x1, y1] = box, { width: w, height: t } = this;
    return this.remember(null, this.canvas((c) =>
      c.drawImage(canvas, u0 * w, v0 * t, (u1 - u0) * w, (v1 - v0) * t,
        x0 * w, y0 * t, (x1 - x0) * w, (y1 - y0) * t))) ?? uri;
  }
}

// ------------------------------------------------------------------ 3 the document as text

function defaultCaption(doc) {
  const prompts = doc.layers.filter(isShown).map((layer) => layer.prompt.trim()).filter(Boolean);
  return `${prompts.join(" and ")} ${doc.background.trim()}`.trim();
}

/** The colour that a prompt names, as #rrggbb: the first, but not in its last word, which is the
 *  object. Python's `colour_of_prompt` knows more grammar; `colours` are those of CSS. */
function colourIn(prompt, colours) {
  const words = (prompt.toLowerCase().match(/[a-z-]+/g) ?? []).slice(0, -1);
  for (const [n, word] of words.entries()) {
    const names = [3, 2, 1].map((length) => words.slice(n, n + length).join("").replaceAll("-", ""));
    names.push(word.slice(word.lastIndexOf("-") + 1)); // "dark-yellow", but not "blue-eyed"
    const name = names.find((each) => Object.hasOwn(colours, each));
    if (name) return colours[name];
  }
  return null;
}

/** What a Layout has of the document: as `Layout.to_json` writes it. */
function layoutOf(doc) {
  return {
    version: 1,
    caption: doc.caption.trim() || defaultCaption(doc),
    background: doc.background,
    layers: doc.layers.filter(isShown).map(({ id, hidden, locked, ...layer }) => layer),
  };
}

/** The Python that `BoxEditor.as_code` gives; here too, for a page that has lost its kernel. */
function codeOf(doc) {
  const literal = (value) => Array.isArray(value) ? `(${value.map(literal).join(", ")})`
    : typeof value === "number" ? String(Number(value.toPrecision(10))) : JSON.stringify(value);
  const layout = layoutOf(doc);
  const layers = layout.layers.map(({ prompt, ...rest }) => {
    const given = Object.entries(rest).map(([name, value]) => `${name}=${literal(value)}`);
    return `        Layer(${[literal(prompt), ...given].join(", ")}),`;
  });
  return ["from lrd_helpers import Layer, Layout", "", "layout = Layout(",
    `    caption=${literal(layout.caption)},`, `    background=${literal(layout.background)},`,
    "    layers=[", ...layers, "    ],", ")", ""].join("\n");
}

/** Why the document is no Layout yet: {text, mark: ids}, or null. */
function faultOf(doc) {
  if (!doc.layers.some(isShown)) return { text: "Draw at least one box first.", mark: [] };
  const unnamed = doc.layers.filter((layer) => isShown(layer) && !layer.prompt.trim());
  if (!unnamed.length) return null;
  const number = doc.layers.indexOf(unnamed[0]) + 1;
  return {
    text: `Layer ${number} has no prompt yet: say what should be there, for example “a red car”.`,
    mark: unnamed.map((layer) => layer.id),
  };
}

// ------------------------------------------------------------------ 4 the editor

class BoxEditor extends Editor {
  drawnTraits = ["snap", "_picture", "_picture_opacity"];
  invitation = "Enter adds a box, Page Up and Page Down select one.";
  kept = "What you drew is still here; “Copy as Python” and download work without it.";

  constructor(model, el, history) {
    super(model, el, history);
    this.tool = "box";
    this.over = false; // draw also where there is a box
    this.large = false; // the canvas is as wide as the page allows, and the list is below it
    this.breadth = 0.08; // of the brush, as a fraction of the longer side
    this.cursor = [0.5, 0.5]; // of the brush, for the keyboard
    this.hand = null; // what Python has of a gesture: "sent", "taken", or "late", as there is more
    const width = model.get("width"), height = model.get("height");
    this.step = [model.get("cell") / width, model.get("cell") / height]; // of the grid
    this.masks = new Masks(width, height, () => this.draw());
  }

  get snap() {
    return this.model.get("snap");
  }

  /** Whether a drag paints, and does not draw or move shapes. */
  get paints() {
    return this.tool === "brush" || this.tool === "eraser";
  }

  /** What the tool draws into a box; null: nothing, as it is too small. */
  shapeIn(box) {
    if (this.tool !== "ellipse") return { box };
    const mask = this.masks.ellipse(box);
    return mask && { mask };
  }

  get sentTraits() {
    return { snap: this.snap };
  }

  /** The layer's box, or the tight one around its mask; null while the mask is decoded. */
  bounds(layer) {
    return layer.box ?? this.masks.get(layer.mask)?.box ?? null;
  }

  /** The same as the gesture has it now. */
  boundsNow(layer) {
    return (this.gesture?.id === layer.id && this.gesture.box) || this.bounds(layer);
  }

  // ---------------------------------------------------------------- build: once

  build() {
    const tool = (name, label) => button(name, label, () => this.use(name), { "data-tool": name });
    this.tools = [
      tool("box", "Draw and move boxes (B)"),
      tool("ellipse", "Draw ellipses (O)"),
      tool("brush", "Paint a shape (P)"),
      tool("eraser", "Erase from a shape (E)"),
    ];
    this.breadthInput = h("input", {
      type: "range", min: 2, max: 30, value: 100 * this.breadth, class: "breadth",
      "aria-label": "Size of the brush", title: "Size of the brush",
      oninput: (event) => { this.breadth = event.target.value / 100; this.draw(); },
    });
    this.overButton = button("over", "Draw over: start a box inside another (or hold Shift)",
      () => { this.over = !this.over; this.draw(); });
    this.startersButton = button("starters", "Begin with one of these layouts", () => this.offer(this.starters.hidden));
    this.startersButton.hidden = !this.model.get("_starters").length;
    this.largeButton = button("large", "Larger canvas", () => { this.large = !this.large; this.draw(); });
    this.snapButton = button("grid", "Keep to the grid of latent pixels", () => {
      this.model.set("snap", !this.snap);
      this.send();
    });
    const toolbar = this.buildToolbar(
      h("div", { class: "group" }, ...this.tools),
      this.breadthInput,
      h("div", { class: "group" }, this.overButton, this.snapButton, this.largeButton, this.startersButton),
      [button("code", "Copy the layout as Python", () => this.copy(), { text: "Copy as Python" }),
        button("download", "Download the layout as JSON", () => this.download()),
        button("upload", "Load a layout from JSON", () => this.openDrawer())]);
    this.addButton = button("add", "Add a layer (N)", () => this.add({ box: MIDDLE }));
    this.copyButton = button("duplicate", "Duplicate (Ctrl+D, or drag with Alt): several boxes with one prompt", () => this.duplicate(this.selected));
    this.buildDrawer();
    this.buildStarters();
    this.scene = h("g");
    this.buildPage("Box editor", [toolbar, this.starters, this.drawer], this.buildCanvas(), [this.addButton, this.copyButton]);
    this.list.before(this.buildBehind());
    this.starters.hidden = this.startersButton.hidden || this.doc.layers.length > 0;
  }

  /** Layouts to begin with, each as a small picture. */
  buildStarters() {
    const [w, t] = this.size;
    const thumbnail = (doc) => h("button", {
      type: "button", title: doc.caption || defaultCaption(doc), "aria-label": `Begin with: ${doc.caption || defaultCaption(doc)}`,
      onclick: () => this.begin(doc),
    }, h("svg", { viewBox: `0 0 ${w} ${t}`, "aria-hidden": "true" },
      h("rect", { width: w, height: t, class: "paper" }),
      ...doc.layers.flatMap((layer, index) => layer.mask
        ? [h("image", { href: layer.mask, width: w, height: t, preserveAspectRatio: "none" })]
        : ["rim", "box"].map((name) => h("rect", {
          ...this.rect(layer.box), class: name, style: `--colour:${this.shadeOf(layer, index)}`,
        })))));
    this.starters = h("div", { class: "starters", role: "group", "aria-label": "Layouts to begin with" },
      ...this.model.get("_starters").map(thumbnail));
  }

  /** How much is seen of the picture that lies under the boxes. */
  buildBehind() {
    this.behindInput = h("input", {
      type: "range", min: 0, max: 100, "aria-label": "Picture under the boxes",
      oninput: () => this.model.set("_picture_opacity", this.behindInput.value / 100),
    });
    this.behind = h("label", { class: "behind", title: "How much is seen of the picture under the boxes" },
      "Picture", this.behindInput);
    return this.behind;
  }

  buildCanvas() {
    const [w, t] = this.size;
    const id = `${this.name}-grid`;
    return [
      h("defs", {},
        h("pattern", { id, width: this.step[0] * w, height: this.step[1] * t, patternUnits: "userSpaceOnUse" },
          h("path", { d: `M${this.step[0] * w} 0H0V${this.step[1] * t}`, class: "gridline" })),
        this.outlineFilter()),
      h("rect", { width: w, height: t, class: "paper" }),
      this.backdrop = h("image", { width: w, height: t, preserveAspectRatio: "none" }),
      this.gridRect = h("rect", { width: w, height: t, fill: `url(#${id})`, "pointer-events": "none" }),
      this.scene,
    ];
  }

  /** Around a mask: its own colour, all of it at the rim and a third within, and a dark rim. */
  outlineFilter() {
    const filter = h("filter", { id: `${this.name}-outline` });
    filter.innerHTML = `<feMorphology operator="dilate" radius="3"/>
      <feComposite operator="out" in2="SourceGraphic"/>
      <feColorMatrix values="0 0 0 0 .125  0 0 0 0 .125  0 0 0 0 .125  0 0 0 .85 0" result="dark"/>
      <feMorphology in="SourceGraphic" operator="dilate" radius="1.5"/>
      <feComposite operator="out" in2="SourceGraphic" result="rim"/>
      <feComponentTransfer in="SourceGraphic" result="within"><feFuncA type="linear" slope=".35"/></feComponentTransfer>
      <feMerge><feMergeNode in="within"/><feMergeNode in="dark"/><feMergeNode in="rim"/></feMerge>`;
    return filter;
  }

  buildDrawer() {
    const file = h("input", {
      type: "file", accept: ".json,application/json", hidden: "",
      onchange: async () => { if (file.files[0]) this.load(await file.files[0].text()); file.value = ""; },
    });
    this.drawerText = h("textarea", { rows: 6, spellcheck: "false", "aria-label": "Layout as text" });
    this.drawerHint = h("p", {});
    this.drawer = h("div", { class: "drawer", hidden: "" }, this.drawerHint, this.drawerText,
      h("div", { class: "buttons" },
        this.loadButton = h("button", { type: "button", class: "primary", onclick: () => this.load(this.drawerText.value) }, "Load"),
        this.fileButton = h("button", { type: "button", onclick: () => file.click() }, "Choose a file…"),
        h("button", { type: "button", onclick: () => this.closeDrawer() }, "Close"), file));
  }

  buildRow(id) {
    const colour = h("input", {
      type: "color", title: "Colour of the vision guidance",
      oninput: () => this.change(id, { colour: colour.value }, `colour ${id}`, 300),
      onchange: () => this.settle(),
    });
    const auto = h("button", { type: "button", class: "auto", onclick: () => this.change(id, { colour: undefined }) }, "×");
    const lock = button("unlocked", "", () => this.change(id, { locked: !this.layerOf(id).locked }));
    return super.buildRow(id, { colour, auto }, { lock });
  }

  // ---------------------------------------------------------------- draw: after every change

  draw() {
    this.root.dataset.tool = this.tool;
    for (const element of this.tools) element.setAttribute("aria-pressed", element.dataset.tool === this.tool);
    this.overButton.setAttribute("aria-pressed", this.over);
    this.snapButton.setAttribute("aria-pressed", this.snap);
    this.largeButton.setAttribute("aria-pressed", this.large);
    this.root.classList.toggle("large", this.large);
    this.startersButton.setAttribute("aria-pressed", !this.starters.hidden);
    this.breadthInput.hidden = !this.paints;
    this.caption.placeholder = defaultCaption(this.doc) || "the whole picture in words";
    this.background.placeholder = "on grass, at night, …";
    this.copyButton.disabled = !this.layer;
    this.hint.textContent = this.doc.layers.length ? "" : "Each box becomes a layer here, with a prompt of its own.";
    super.draw();
  }

  hintText() {
    if (this.tool === "brush") {
      return this.layer?.mask ? "Painting adds to the selected shape; Escape starts a new one." : "Paint a new shape.";
    }
    if (this.tool === "eraser") return this.layer ? "Erase parts of the selected layer." : "Select a layer to erase from.";
    if (this.over) return "Drag anywhere to draw a box, also over another.";
    return super.hintText();
  }

  drawScene() {
    const picture = this.model.get("_picture");
    if (this.backdrop.getAttribute("href") !== picture) this.backdrop.setAttribute("href", picture);
    this.backdrop.style.display = picture ? "" : "none";
    this.behind.hidden = !picture;
    const seen = this.model.get("_picture_opacity");
    this.backdrop.setAttribute("opacity", seen);
    this.behindInput.value = 100 * seen;
    this.svg.classList.toggle("pictured", Boolean(picture) && seen > 0);
    this.gridRect.style.display = this.snap ? "" : "none";
    const parts = this.doc.layers.map((layer, index) => isShown(layer) && this.drawLayer(layer, index));
    if (!this.doc.layers.length && !this.gesture) {
      const verb = this.paints ? "Paint a shape here" : `Drag here to draw ${this.tool === "box" ? "a box" : "an ellipse"}`;
      parts.push(h("text", { x: this.size[0] / 2, y: this.size[1] / 2, class: "invite" }, verb));
    }
    if (this.gesture?.kind === "draw" && this.gesture.box) {
      const { x, y, width, height } = this.rect(this.gesture.box), [rx, ry] = [width / 2, height / 2];
      parts.push(this.tool === "ellipse" ? h("ellipse", { cx: x + rx, cy: y + ry, rx, ry, class: "new" })
        : h("rect", { x, y, width, height, class: "new" }));
    }
    if (this.gesture?.kind === "stroke") {
      const points = this.gesture.points.map(([x, y]) => `${x * this.size[0]},${y * this.size[1]}`);
      parts.push(h("polyline", {
        points: [points[0], ...points].join(" "), class: `stroke ${this.tool}`,
        "stroke-width": this.breadth * 400, stroke: this.colourOf(this.layer),
      }));
    } else if (this.paints) {
      parts.push(h("circle", {
        cx: this.cursor[0] * this.size[0], cy: this.cursor[1] * this.size[1], r: this.breadth * 200, class: "cursor",
      }));
    }
    if (this.layer && isShown(this.layer) && !this.layer.locked && !this.paints) {
      parts.push(...this.drawHandles(this.layer));
    }
    this.scene.replaceChildren(...parts.filter(Boolean));
  }

  /** The colour of a layer's vision guidance, as #rrggbb, or null: its own, or its prompt's. */
  ownColour(layer) {
    if (!layer.colour) return colourIn(layer.prompt, this.model.get("_colours"));
    const context = (this.paint ??= h("canvas").getContext("2d"));
    context.fillStyle = layer.colour; // any name or hex of CSS becomes #rrggbb
    return context.fillStyle;
  }

  /** The colour a layer is drawn in: its own, so that a yellow star is not orange, or its number's. */
  shadeOf(layer, index) {
    const palette = this.model.get("_palette");
    return (layer && this.ownColour(layer)) ?? palette[index % palette.length];
  }

  colourOf(layer) {
    return this.shadeOf(layer, layer ? this.doc.layers.indexOf(layer) : this.doc.layers.length);
  }

  drawLayer(layer, index) {
    const was = this.bounds(layer);
    if (!was) return null; // the mask is being decoded
    const box = this.boundsNow(layer);
    const colour = this.colourOf(layer);
    const selected = layer.id === this.selected;
    const parts = [];
    if (layer.mask) {
      const id = `${this.name}-mask-${index}`, [w, t] = this.size;
      const [x, y] = [0, 1].map((i) => (box[i + 2] - box[i]) / (was[i + 2] - was[i]));
      const place = `translate(${box[0] * w} ${box[1] * t}) scale(${x} ${y}) translate(${-was[0] * w} ${-was[1] * t})`;
      parts.push(
        h("mask", { id, maskUnits: "userSpaceOnUse", x: 0, y: 0, width: w, height: t },
          h("image", { href: layer.mask, width: w, height: t, preserveAspectRatio: "none" })),
        h("g", { transform: place, filter: `url(#${this.name}-outline)`, class: "shape" },
          h("rect", { width: w, height: t, fill: colour, mask: `url(#${id})` })));
      if (selected) parts.push(h("rect", { ...this.rect(box), class: "frame" }));
    } else {
      parts.push(h("rect", { ...this.rect(box), class: "halo" }),
        h("rect", { ...this.rect(box), class: "box", fill: colour, stroke: colour }));
    }
    parts.push(this.drawTag(layer, index, box, colour));
    return h("g", {
      "data-layer": layer.id,
      style: `--opacity:${layer.opacity ?? 1}`,
      class: ["layer", selected && "selected", layer.locked && "fixed", this.notice.mark.includes(layer.id) && "marked"].filter(Boolean).join(" "),
    }, ...parts);
  }

  drawTag(layer, index, box, colour) {
    const { x, y } = this.rect(box);
    const share = layer.opacity < 1 ? ` ${percentOf(layer)} %` : "";
    const text = `${index + 1} ${layer.prompt.trim()}`.trim() + share;
    const room = Math.floor((this.size[0] - 10) / LETTER);
    const shown = text.length > room ? `${text.slice(0, room - 1)}…` : text;
    const width = shown.length * LETTER + 10;
    const left = clamp(x, 0, Math.max(0, this.size[0] - width)); // to the left rather than cut off
    return h("g", { class: "tag" },
      h("rect", { x: left, y, width, height: 18, rx: 2, fill: colour }),
      h("text", { x: left + 5, y: y + 13, fill: inkOn(colour) }, shown));
  }

  drawHandles(layer) {
    if (!this.bounds(layer)) return [];
    const { x, y, width, height } = this.rect(this.boundsNow(layer));
    return HANDLES.map((name) => {
      const at = {
        cx: x + (name.includes("w") ? 0 : name.includes("e") ? width : width / 2),
        cy: y + (name.includes("n") ? 0 : name.includes("s") ? height : height / 2),
      };
      return h("g", { class: `handle ${name}` },
        h("circle", { ...at, class: "reach", "data-handle": name }), // what a finger hits
        h("circle", { ...at, class: "dot", r: 5, stroke: this.colourOf(layer) }));
    });
  }

  drawRow(row, layer) {
    const label = super.drawRow(row, layer);
    row.chip.textContent = this.numberOf(layer);
    const chip = this.colourOf(layer);
    row.chip.style.setProperty("--chip", chip);
    row.chip.style.setProperty("--ink-on-chip", inkOn(chip));
    label(row.lock, layer.locked ? "Unlock" : "Lock");
    row.lock.querySelector("path").setAttribute("d", ICONS[layer.locked ? "locked" : "unlocked"]);
    row.lock.classList.toggle("on", Boolean(layer.locked));
    const own = this.ownColour(layer);
    row.colour.value = own ?? "#808080";
    label(row.colour, `Colour of the vision guidance${layer.colour ? "" : own ? " (from the prompt)" : " (none yet)"}`);
    row.colour.classList.toggle("none", !own);
    label(row.auto, "Take the colour from the prompt again");
    row.auto.hidden = !layer.colour;
    return label;
  }

  // ---------------------------------------------------------------- pointer

  /** The layers that can be taken hold of there, the front one first. */
  under(point) {
    return this.doc.layers.filter((layer) => {
      const box = isShown(layer) && !layer.locked && this.bounds(layer);
      return box && inside(point, box);
    }).reverse();
  }

  gestureAt(start, event) {
    const { handle } = event.target.dataset;
    if (this.paints) {
      if (this.tool === "eraser" && !this.layer) this.selected = this.under(start)[0]?.id ?? null;
      return { kind: "stroke", points: [start] };
    }
    if (handle) return { kind: "resize", id: this.selected, from: this.bounds(this.layer), handle, start };
    const found = this.over || event.shiftKey ? [] : this.under(start);
    if (event.altKey && found.length) {
      const copied = found.find((layer) => layer.id === this.selected) ?? found[0];
      this.add({ ...copied, id: randomName() }, copied.prompt);
      found.unshift(this.layer);
    }
    const held = this.hold(found, start);
    return held ? { ...held, from: this.bounds(this.layer) } : { kind: "draw", start };
  }

  pointerMove(event) {
    const point = this.at(event);
    if (this.paints) this.cursor = point;
    const { gesture } = this;
    if (!gesture || event.pointerId !== gesture.pointer) return this.paints && this.drawScene();
    if (gesture.kind === "stroke") {
      gesture.points.push(...(event.getCoalescedEvents?.() ?? []).map((each) => this.at(each)), point);
    } else {
      const by = this.shift(gesture, point);
      if (!by) return null;
      gesture.box = this.gridded(gesture, ...by, point);
      this.drawAlong();
    }
    return this.drawScene();
  }

  /** Where Python draws along, it gets the draft as the hand has it now, though no edit is made yet:
   *  the newest, when it has taken the last. */
  drawAlong() {
    const layer = this.layerOf(this.gesture?.id);
    if (!this.model.get("_followed") || !layer?.box || !this.gesture.box) return;
    if (this.hand === "sent" || this.hand === "late") {
      this.hand = "late";
      return;
    }
    this.hand = "sent";
    const box = this.gesture.box.map(tidy);
    const layers = this.doc.layers.map((each) => each === layer ? { ...each, box } : each);
    this.tellHand({ ...this.doc, layers });
  }

  letGo() {
    if (this.hand) this.tellHand(null);
    this.hand = null;
  }

  tellHand(document) {
    try {
      this.model.send({ kind: "hand", document });
    } catch { /* the line is closed: the next edit says so */ }
  }

  /** The box that the gesture has come to. */
  gridded({ kind, from, handle, start }, dx, dy, point) {
    const near = (value, i) => this.snap ? clamp(Math.round(value / this.step[i % 2]) * this.step[i % 2], 0, 1) : value;
    if (kind === "draw") {
      return [0, 1].map((i) => near(Math.min(start[i], point[i]), i))
        .concat([0, 1].map((i) => near(Math.max(start[i], point[i]), i)));
    }
    if (kind === "move") return moved(from, near(from[0] + dx, 0) - from[0], near(from[1] + dy, 1) - from[1]);
    const least = this.snap ? this.step : [LEAST, LEAST];
    return resized(from, handle, dx, dy, least).map((value, i) => value === from[i] ? value : near(value, i));
  }

  finish(gesture) {
    const box = gesture.box?.map(tidy);
    if (gesture.kind === "stroke") this.stroke(gesture.points);
    else if (gesture.kind === "draw") {
      const large = box && box[2] - box[0] >= LEAST && box[3] - box[1] >= LEAST;
      const shape = large && this.shapeIn(box);
      if (shape) this.add(shape);
      else { // of no area: a click beside everything
        this.select(null);
        this.say(box ? `Drag further, in both directions, to make ${this.tool === "box" ? "a box" : "an ellipse"}.` : "");
      }
    } else if (box) this.place(gesture.id, box);
    else if (gesture.kind === "move") this.select(gesture.next);
  }

  // ---------------------------------------------------------------- keyboard

  command(event) {
    const { key } = event;
    const control = event.ctrlKey || event.metaKey;
    const low = key.toLowerCase();
    const plain = !control && !event.altKey, drawn = event.target === this.svg;
    if (control && low === "d") return act(() => this.duplicate(this.selected));
    if (plain && drawn && this.paints && (key === "Enter" || key === " ")) return act(() => this.stroke([this.cursor]));
    if (super.command(event)) return true;
    if (!plain) return false;
    const tool = { b: "box", o: "ellipse", p: "brush", e: "eraser" }[low];
    if (tool) return act(() => this.use(tool));
    return drawn && (key === "Enter" || low === "n") && act(() => this.add(this.shapeIn(MIDDLE)));
  }

  arrow([dx, dy], resize) {
    const step = this.snap ? this.step : [0.01, 0.01];
    if (this.paints) {
      this.cursor = this.cursor.map((value, i) => clamp(value + 2 * [dx, dy][i] * step[i], 0, 1));
      return this.draw();
    }
    const box = this.layer && this.bounds(this.layer);
    if (!box || this.layer.locked) return null;
    const next = resize ? resized(box, "se", dx * step[0], dy * step[1], step) : moved(box, dx * step[0], dy * step[1]);
    return this.place(this.selected, next.map(tidy), `arrow ${this.selected} ${resize}`, 150);
  }

  escape() {
    return this.drawer.hidden ? super.escape() : this.closeDrawer();
  }

  use(tool) {
    this.tool = tool;
    this.say("");
  }

  // ---------------------------------------------------------------- edits

  add(shape, prompt = "") {
    const layer = { id: randomName(), ...shape, prompt, hidden: false, locked: false };
    this.selected = layer.id;
    this.edited([...this.doc.layers, layer]);
    if (!prompt) this.rows.get(layer.id).prompt.focus({ preventScroll: true }); // it is typed next
  }

  /** Show the layouts to begin with, or hide them. */
  offer(open) {
    this.starters.hidden = !open;
    this.draw();
  }

  begin(doc) {
    this.selected = null;
    this.edit({ ...doc, layers: doc.layers.map((layer) => ({ ...layer, id: randomName() })) });
    this.offer(false);
    this.svg.focus({ preventScroll: true });
  }

  /** Put a layer's box, or its mask, where `box` is. */
  place(id, box, key, delay) {
    const layer = this.layerOf(id);
    if (layer) this.change(id, layer.mask ? { mask: this.masks.fitted(layer.mask, box) } : { box }, key, delay);
  }

  stroke(points) {
    const erase = this.tool === "eraser";
    const layer = erase || this.layer?.mask ? this.layer : null;
    if (layer?.locked) return this.say("This layer is locked.", true);
    if (erase && !layer) return this.say("Select a layer to erase from.", true);
    const mask = this.masks.painted(layer, points, this.breadth, erase);
    if (!layer) return mask && this.add({ mask });
    if (!mask) return this.remove(layer.id);
    return this.change(layer.id, { mask, box: undefined });
  }

  duplicate(id) {
    const layer = this.layerOf(id);
    const box = layer && this.bounds(layer);
    if (!box) return;
    const { id: _, mask, ...rest } = layer;
    const shifted = moved(box, box[2] > 0.95 ? -0.05 : 0.05, box[3] > 0.95 ? -0.05 : 0.05).map(tidy);
    const copy = { ...rest, ...(mask ? { mask: this.masks.fitted(mask, shifted) } : { box: shifted }) };
    this.add({ ...copy, locked: false }, layer.prompt);
  }

  // ---------------------------------------------------------------- text in and out

  copy() {
    const fault = faultOf(this.doc);
    if (fault) return this.say(fault.text, true, fault.mark);
    const code = codeOf(this.doc);
    const byHand = () => this.openDrawer(code); // where the page may not use the clipboard
    if (!navigator.clipboard) return byHand();
    return navigator.clipboard.writeText(code).then(() => this.say("Copied as Python: paste it into a cell."), byHand);
  }

  download() {
    const fault = faultOf(this.doc);
    if (fault) return this.say(fault.text, true, fault.mark);
    const text = `${JSON.stringify(layoutOf(this.doc), null, 2)}\n`;
    return this.save("layout.json", text, "application/json");
  }

  /** The drawer is for pasting a layout, or shows `code` to be copied by hand. */
  openDrawer(code = null) {
    this.drawer.hidden = false;
    this.drawerHint.textContent = code ? "Press Ctrl+C to copy." : "Paste a layout as JSON, or choose a file.";
    this.drawerText.value = code ?? "";
    this.loadButton.hidden = this.fileButton.hidden = Boolean(code);
    this.drawerText.focus();
    this.drawerText.select();
  }

  closeDrawer() {
    this.drawer.hidden = true;
    this.svg.focus({ preventScroll: true });
  }

  /** Python decides whether a text is a layout: it answers with the document or with a notice. */
  load(text) {
    this.ask({ kind: "load", text });
  }

  hear(message) {
    if (message.kind === "handed" && this.hand) {
      const late = this.hand === "late";
      this.hand = "taken";
      if (late) this.drawAlong();
    }
    if (message.kind !== "loaded") return;
    this.drawer.hidden = true;
    this.say("Loaded.");
  }
}

export default widgetOf(BoxEditor);
