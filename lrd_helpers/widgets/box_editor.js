// The page of BoxEditor (box_editor.py), after elements.js: one ES module, nothing to build.
//
// In reading order: 1 icons · 2 geometry · 3 masks · 4 the document as text · 5 its history ·
// 6 the editor: build, draw, pointer, keyboard, edits, Python · 7 what anywidget calls.
//
// The document is a value: {caption, background, layers: [{id, prompt, box | mask, …}]}, back to
// front. An edit makes a new one, so undo is a list of old ones and Python never sees half of one.

// ------------------------------------------------------------------ 1 icons

const ICONS = {
  box: "M4 6h16v12H4zM4 6h.01M20 6h.01M4 18h.01M20 18h.01",
  brush: "M4 20c4 0 5-1.5 5-3.5S7 13.5 5.5 14.5 5.5 18.5 4 20zM8.5 14 18 4l2.5 2.5-9.5 10",
  eraser: "M9 19h11M4.5 15.5 13 6l6 5.5L12.5 19H8z",
  over: "M4 4h11v11H4zM9 9h11v11H9z",
  grid: "M4 4h16v16H4zM4 9.3h16M4 14.7h16M9.3 4v16M14.7 4v16",
  undo: "M8 5 4 9l4 4M4 9h10a5 5 0 0 1 0 10h-3",
  redo: "M16 5l4 4-4 4M20 9H10a5 5 0 0 0 0 10h3",
  duplicate: "M8 8h12v12H8zM16 8V4H4v12h4",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5M14 11v5",
  eye: "M2 12s4-7 10-7 10 7 10 7-4 7-10 7S2 12 2 12zM12 9a3 3 0 1 0 0 6 3 3 0 0 0 0-6z",
  hidden: "M3 3l18 18M10 5.2c6.5-1 12 6.8 12 6.8a20 20 0 0 1-3 3.7M6 7.2A20 20 0 0 0 2 12s5.5 8.5 13 6.4",
  locked: "M6 11h12v9H6zM8 11V8a4 4 0 0 1 8 0v3",
  unlocked: "M6 11h12v9H6zM8 11V8a4 4 0 0 1 7.8-1.2",
  up: "M12 19V5M6 11l6-6 6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  grip: "M9 6h.01M15 6h.01M9 12h.01M15 12h.01M9 18h.01M15 18h.01",
  code: "M8 7l-5 5 5 5M16 7l5 5-5 5",
  download: "M12 4v11M7 10l5 5 5-5M4 20h16",
  upload: "M12 16V5M7 9l5-5 5 5M4 20h16",
};
const HANDLES = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];

function icon(name) {
  return h("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" },
    h("path", { d: ICONS[name] }));
}

function button(name, label, onclick, attributes = {}) {
  const { text, ...rest } = attributes;
  return h("button",
    { type: "button", title: label, "aria-label": text ? null : label, onclick, ...rest },
    icon(name), text);
}

// ------------------------------------------------------------------ 2 geometry

const LEAST = 0.01; // smallest side of a box, as a fraction of the canvas
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const tidy = (value) => Math.round(value * 1e4) / 1e4; // a tenth of a thousandth is enough
const inside = ([x, y], [x0, y0, x1, y1]) => x >= x0 && x <= x1 && y >= y0 && y <= y1;
const spoken = (box) => ["left", "top", "right", "bottom"]
  .map((side, i) => `${side} ${Math.round(box[i] * 100)} %`).join(", ");

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

// ------------------------------------------------------------------ 3 masks

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
    const box = [this.width, this.height, 0, 0];
    for (let i = 0; i < pixels.data.length; i += 4) {
      const yes = pixels.data[i + 3] > 127 && pixels.data[i] > 127;
      pixels.data.fill(yes ? 255 : 0, i, i + 4);
      if (!yes) continue;
      const x = (i / 4) % this.width, y = Math.floor(i / 4 / this.width);
      box[0] = Math.min(box[0], x);
      box[1] = Math.min(box[1], y);
      box[2] = Math.max(box[2], x + 1);
      box[3] = Math.max(box[3], y + 1);
    }
    if (!box[2]) return null; // nothing in it
    context.putImageData(pixels, 0, 0);
    uri ??= canvas.toDataURL();
    const size = [this.width, this.height, this.width, this.height];
    this.known.set(uri, { canvas, box: box.map((value, i) => value / size[i]) });
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

  /** The mask moved and stretched so that its tight box becomes `box`. */
  fitted(uri, box) {
    const { canvas, box: [u0, v0, u1, v1] } = this.get(uri);
    const [x0, y0, x1, y1] = box, { width: w, height: t } = this;
    return this.remember(null, this.canvas((c) =>
      c.drawImage(canvas, u0 * w, v0 * t, (u1 - u0) * w, (v1 - v0) * t,
        x0 * w, y0 * t, (x1 - x0) * w, (y1 - y0) * t))) ?? uri;
  }
}

// ------------------------------------------------------------------ 4 the document as text

const isShown = (layer) => !layer.hidden;
const percentOf = (layer) => Math.round(100 * (layer.opacity ?? 1));

function defaultCaption(doc) {
  const prompts = doc.layers.filter(isShown).map((layer) => layer.prompt.trim()).filter(Boolean);
  return `${prompts.join(" and ")} ${doc.background.trim()}`.trim();
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

// ------------------------------------------------------------------ 5 its history

const randomName = () => Math.random().toString(36).slice(2, 10);

/** The document and what can be undone. All views of one editor have the same history. */
class History {
  constructor(model) {
    this.model = model;
    this.doc = model.get("document");
    this.past = [];
    this.future = [];
    this.lastKey = null; // edits in a row with one key are one step of undo
    model.on("change:document", () => {
      const doc = model.get("document");
      if (doc !== this.doc) this.edit(doc); // Python's: it can be undone, too
    });
  }

  edit(doc, key = null) {
    if (key === null || key !== this.lastKey) this.past.push(this.doc);
    if (this.past.length > 200) this.past.shift();
    this.lastKey = key;
    this.future = [];
    this.show(doc);
  }

  /** Go one step from the past to the future, or back; whether there is one. */
  travel(from, to) {
    if (!from.length) return false;
    to.push(this.doc);
    this.lastKey = null;
    this.show(from.pop());
    return true;
  }

  show(doc) {
    this.doc = doc;
    this.model.set("document", doc); // each view hears it, and a notebook is saved with it
  }
}

// ------------------------------------------------------------------ 6 the editor

class Editor {
  constructor(model, el, history) {
    this.model = model;
    this.el = el;
    this.history = history;
    this.name = `lrd-${randomName()}`; // ids in the page start with it; a counter would be the module's, and each editor loads its own
    this.selected = null; // the id of a layer
    this.tool = "box";
    this.over = false; // draw also where there is a box
    this.breadth = 0.08; // of the brush, as a fraction of the longer side
    this.cursor = [0.5, 0.5]; // of the brush, for the keyboard
    this.gesture = null;
    this.notice = { text: "", mark: [] };
    const width = model.get("width"), height = model.get("height");
    this.size = [width, height].map((side) => side * 400 / Math.max(width, height)); // in SVG units
    this.step = [model.get("cell") / width, model.get("cell") / height]; // of the grid
    this.masks = new Masks(width, height, () => this.draw());
    this.rows = new Map(); // layer id → its row in the list
    this.build();
    this.listen();
    this.draw();
  }

  get doc() {
    return this.history.doc;
  }

  get layer() {
    return this.doc.layers.find((layer) => layer.id === this.selected) ?? null;
  }

  get snap() {
    return this.model.get("snap");
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
    this.snapButton = button("grid", "Keep to the grid of latent pixels", () => {
      this.model.set("snap", !this.snap);
      this.send();
    });
    this.undoButton = button("undo", "Undo (Ctrl+Z)", () => this.undo());
    this.redoButton = button("redo", "Redo (Ctrl+Shift+Z)", () => this.redo());
    const toolbar = h("div", { class: "toolbar", role: "toolbar", "aria-label": "Tools" },
      h("div", { class: "group" }, ...this.tools),
      this.breadthInput,
      h("div", { class: "group" }, this.overButton, this.snapButton),
      h("div", { class: "group" }, this.undoButton, this.redoButton),
      h("div", { class: "group end" },
        button("code", "Copy the layout as Python", () => this.copy(), { text: "Copy as Python" }),
        button("download", "Download the layout as JSON", () => this.download()),
        button("upload", "Load a layout from JSON", () => this.openDrawer())));

    const [w, t] = this.size;
    const id = `${this.name}-grid`;
    this.scene = h("g");
    this.svg = h("svg", {
      viewBox: `0 0 ${w} ${t}`, style: `max-width:${1.1 * w}px`, class: "canvas",
      tabindex: 0, role: "application",
      "aria-roledescription": "canvas",
      onpointerdown: (event) => this.pointerDown(event),
      onpointermove: (event) => this.pointerMove(event),
      onpointerup: (event) => this.pointerUp(event),
      onpointercancel: () => this.endGesture(),
      onlostpointercapture: () => this.endGesture(),
    },
    h("defs", {},
      h("pattern", { id, width: this.step[0] * w, height: this.step[1] * t, patternUnits: "userSpaceOnUse" },
        h("path", { d: `M${this.step[0] * w} 0H0V${this.step[1] * t}`, class: "gridline" })),
      this.outlineFilter()),
    h("rect", { width: w, height: t, class: "paper" }),
    this.backdrop = h("image", { width: w, height: t, preserveAspectRatio: "none" }),
    this.gridRect = h("rect", { width: w, height: t, fill: `url(#${id})`, "pointer-events": "none" }),
    this.scene);

    const field = (name, label) => {
      const input = h("input", {
        type: "text", id: `${this.name}-${name}`, spellcheck: "false", autocomplete: "off",
        oninput: () => this.edit({ ...this.doc, [name]: input.value }, name, 300),
        onblur: () => this.settle(),
      });
      this[name] = input;
      return h("div", { class: "field" }, h("label", { for: input.id }, label), input);
    };
    this.upButton = button("up", "Bring forward ( ] )", () => this.reorder(this.selected, 1));
    this.downButton = button("down", "Send backward ( [ )", () => this.reorder(this.selected, -1));
    this.copyButton = button("duplicate", "Duplicate (Ctrl+D)", () => this.duplicate(this.selected));
    this.trashButton = button("trash", "Delete (Delete)", () => this.remove(this.selected));
    this.list = h("ol", { class: "layers", "aria-label": "Layers, the front one first" });
    this.hint = h("p", { class: "hint" });
    const side = h("div", { class: "side" },
      field("caption", "Caption"), field("background", "Background"),
      h("div", { class: "listhead" }, h("span", {}, "Layers ", h("small", {}, "front first")),
        h("div", { class: "group" }, this.upButton, this.downButton, this.copyButton, this.trashButton)),
      this.list, this.hint);

    this.status = h("div", { class: "status", role: "status", "aria-live": "polite" });
    this.lost = h("div", { class: "lost", role: "alert", hidden: "" });
    this.buildDrawer();
    this.root = h("div", {
      class: "lrd-widget lrd-editor", role: "group", "aria-label": "Box editor",
      onkeydown: (event) => this.keyDown(event),
    }, toolbar, this.lost, this.drawer, h("div", { class: "body" }, this.svg, side), this.status);
    this.el.append(this.root);
    this.leaveTheme = followTheme(this.root, this.el);
  }

  /** Around a mask: its own colour, all of it at the rim and a third within. */
  outlineFilter() {
    const filter = h("filter", { id: `${this.name}-outline` });
    filter.innerHTML = `<feMorphology operator="dilate" radius="1.5"/>
      <feComposite operator="out" in2="SourceGraphic" result="rim"/>
      <feComponentTransfer in="SourceGraphic" result="within"><feFuncA type="linear" slope=".35"/></feComponentTransfer>
      <feMerge><feMergeNode in="within"/><feMergeNode in="rim"/></feMerge>`;
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
    const change = (make) => this.change(id, make(this.doc.layers.find((layer) => layer.id === id)));
    const parts = {
      grip: button("grip", "", null, { class: "grip", onpointerdown: (event) => this.dragRow(event, id) }),
      chip: h("button", { type: "button", class: "chip", onclick: () => this.select(id) }),
      prompt: h("input", {
        type: "text", class: "prompt", spellcheck: "false", autocomplete: "off", placeholder: "what is here?",
        oninput: () => this.change(id, { prompt: parts.prompt.value }, `prompt ${id}`, 300),
        onblur: () => this.settle(),
        onfocus: () => this.select(id),
      }),
      colour: h("input", {
        type: "color", title: "Colour of the vision guidance",
        oninput: () => this.change(id, { colour: parts.colour.value }, `colour ${id}`, 300),
        onchange: () => this.settle(),
      }),
      auto: h("button", { type: "button", class: "auto", onclick: () => this.change(id, { colour: undefined }) }, "×"),
      opacity: h("input", {
        type: "range", min: 0, max: 100, title: "Opacity: how much of what lies behind it hides",
        oninput: () => {
          const opacity = parts.opacity.value / 100;
          this.change(id, { opacity: opacity < 1 ? opacity : undefined }, `opacity ${id}`, 300);
        },
        onchange: () => this.settle(),
      }),
      percent: h("span"),
      hide: button("eye", "", () => change((layer) => ({ hidden: !layer.hidden }))),
      lock: button("unlocked", "", () => change((layer) => ({ locked: !layer.locked }))),
    };
    const { opacity, percent, ...above } = parts;
    const glass = h("label", { class: "glass" }, "Opacity", opacity, percent);
    const element = h("li", { "data-layer": id, onclick: () => this.select(id) }, ...Object.values(above), glass);
    return { element, glass, ...parts };
  }

  // ---------------------------------------------------------------- draw: after every change

  draw() {
    this.root.dataset.tool = this.tool;
    this.drawTools();
    this.drawScene();
    this.drawList();
    const text = this.notice.text || this.hintText();
    if (this.status.textContent !== text) this.status.textContent = text;
    this.status.classList.toggle("warn", Boolean(this.notice.warn));
  }

  hintText() {
    if (this.tool === "brush") {
      return this.layer?.mask ? "Painting adds to the selected shape; Escape starts a new one." : "Paint a new shape.";
    }
    if (this.tool === "eraser") return this.layer ? "Erase parts of the selected layer." : "Select a layer to erase from.";
    if (this.over) return "Drag anywhere to draw a box, also over another.";
    return this.layer ? `Layer ${this.doc.layers.indexOf(this.layer) + 1}: ${spoken(this.bounds(this.layer) ?? [0, 0, 1, 1])}` : "";
  }

  drawTools() {
    for (const element of this.tools) element.setAttribute("aria-pressed", element.dataset.tool === this.tool);
    this.overButton.setAttribute("aria-pressed", this.over);
    this.snapButton.setAttribute("aria-pressed", this.snap);
    this.undoButton.disabled = !this.history.past.length;
    this.redoButton.disabled = !this.history.future.length;
    this.breadthInput.hidden = this.tool === "box";
    for (const name of ["caption", "background"]) {
      if (this[name].value !== this.doc[name]) this[name].value = this.doc[name];
    }
    this.caption.placeholder = defaultCaption(this.doc) || "the whole picture in words";
    this.background.placeholder = "on grass, at night, …";
  }

  drawScene() {
    const picture = this.model.get("_picture");
    this.backdrop.setAttribute("href", picture);
    this.backdrop.style.display = picture ? "" : "none";
    this.svg.classList.toggle("pictured", Boolean(picture));
    this.gridRect.style.display = this.snap ? "" : "none";
    const parts = this.doc.layers.map((layer, index) => isShown(layer) && this.drawLayer(layer, index));
    if (!this.doc.layers.length && !this.gesture) {
      const verb = this.tool === "box" ? "Drag here to draw a box" : "Paint a shape here";
      parts.push(h("text", { x: this.size[0] / 2, y: this.size[1] / 2, class: "invite" }, verb));
    }
    if (this.gesture?.kind === "draw" && this.gesture.box) {
      parts.push(h("rect", { ...this.rect(this.gesture.box), class: "new" }));
    }
    if (this.gesture?.kind === "stroke") {
      const points = this.gesture.points.map(([x, y]) => `${x * this.size[0]},${y * this.size[1]}`);
      parts.push(h("polyline", {
        points: [points[0], ...points].join(" "), class: `stroke ${this.tool}`,
        "stroke-width": this.breadth * 400, stroke: this.colourOf(this.layer),
      }));
    } else if (this.tool !== "box") {
      parts.push(h("circle", {
        cx: this.cursor[0] * this.size[0], cy: this.cursor[1] * this.size[1], r: this.breadth * 200, class: "cursor",
      }));
    }
    if (this.layer && isShown(this.layer) && !this.layer.locked && this.tool === "box") {
      parts.push(...this.drawHandles(this.layer));
    }
    this.scene.replaceChildren(...parts.filter(Boolean));
    const { layer } = this;
    this.svg.setAttribute("aria-label", layer
      ? `Layer ${this.doc.layers.indexOf(layer) + 1} of ${this.doc.layers.length}, ${layer.prompt || "no prompt"}, ${spoken(this.bounds(layer) ?? [0, 0, 1, 1])}`
      : `${this.doc.layers.length} layers. Enter adds a box, Page Up and Page Down select one.`);
  }

  rect([x0, y0, x1, y1]) {
    const [w, t] = this.size;
    return { x: x0 * w, y: y0 * t, width: (x1 - x0) * w, height: (y1 - y0) * t };
  }

  colourOf(layer) {
    const palette = this.model.get("_palette");
    const index = layer ? this.doc.layers.indexOf(layer) : this.doc.layers.length;
    return palette[index % palette.length];
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
    const { x, y, width } = this.rect(box);
    const share = layer.opacity < 1 ? ` ${percentOf(layer)} %` : "";
    const room = Math.max(0, Math.floor((width - 26) / 6.6) - share.length);
    const prompt = layer.prompt.trim();
    const shown = prompt.length > room ? (room > 2 ? `${prompt.slice(0, room - 1)}…` : "") : prompt;
    const text = `${index + 1} ${shown}`.trim() + share;
    const [red, green, blue] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
    const dark = 0.3 * red + 0.6 * green + 0.1 * blue < 110;
    return h("g", { class: "tag" },
      h("rect", { x, y, width: text.length * 6.6 + 10, height: 18, rx: 2, fill: colour }),
      h("text", { x: x + 5, y: y + 13, fill: dark ? "#fff" : "#111" }, text));
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

  drawList() {
    const focused = this.root.getRootNode().activeElement;
    const ids = new Set(this.doc.layers.map((layer) => layer.id));
    for (const [id, row] of this.rows) {
      if (!ids.has(id)) { row.element.remove(); this.rows.delete(id); }
    }
    // By key, in place: a prompt that is being typed must not be rebuilt under the hands.
    [...this.doc.layers].reverse().forEach((layer, position) => {
      if (!this.rows.has(layer.id)) this.rows.set(layer.id, this.buildRow(layer.id));
      const row = this.rows.get(layer.id);
      if (this.list.children[position] !== row.element) this.list.insertBefore(row.element, this.list.children[position] ?? null);
      this.drawRow(row, layer);
    });
    // Moving an element in the page takes the focus from it.
    if (focused && this.list.contains(focused) && focused !== this.root.getRootNode().activeElement) focused.focus();
    const index = this.doc.layers.indexOf(this.layer);
    this.upButton.disabled = index < 0 || index === this.doc.layers.length - 1;
    this.downButton.disabled = index < 1;
    this.copyButton.disabled = this.trashButton.disabled = index < 0;
    this.hint.textContent = this.doc.layers.length ? "" : "Each box becomes a layer here, with a prompt of its own.";
  }

  drawRow(row, layer) {
    const number = this.doc.layers.indexOf(layer) + 1;
    const name = `layer ${number}${layer.prompt ? `, ${layer.prompt}` : ""}`;
    const label = (element, text) => { element.title = text; element.setAttribute("aria-label", `${text}: ${name}`); };
    row.element.classList.toggle("selected", layer.id === this.selected);
    row.element.classList.toggle("dim", Boolean(layer.hidden));
    row.element.classList.toggle("marked", this.notice.mark.includes(layer.id));
    row.chip.textContent = number;
    row.chip.style.setProperty("--chip", this.colourOf(layer));
    label(row.chip, "Select");
    row.chip.setAttribute("aria-pressed", layer.id === this.selected);
    label(row.grip, "Drag, or use the arrow keys, to change the order");
    if (row.prompt.value !== layer.prompt) row.prompt.value = layer.prompt;
    row.prompt.setAttribute("aria-label", `Prompt of layer ${number}`);
    row.prompt.setAttribute("aria-invalid", this.notice.mark.includes(layer.id));
    label(row.hide, layer.hidden ? "Show" : "Hide");
    label(row.lock, layer.locked ? "Unlock" : "Lock");
    // The icons stay the elements they are: a click on one that is replaced between press and
    // release is none.
    row.hide.querySelector("path").setAttribute("d", ICONS[layer.hidden ? "hidden" : "eye"]);
    row.lock.querySelector("path").setAttribute("d", ICONS[layer.locked ? "locked" : "unlocked"]);
    row.lock.classList.toggle("on", Boolean(layer.locked));
    row.hide.classList.toggle("on", Boolean(layer.hidden));
    const own = layer.colour ?? layer.prompt.toLowerCase().match(/[a-z]+/g)?.slice(0, -1).find((word) => CSS.supports("color", word));
    const context = (this.paint ??= h("canvas").getContext("2d"));
    context.fillStyle = "#808080";
    if (own) context.fillStyle = own; // what a colour input takes: any name of CSS as #rrggbb
    row.colour.value = context.fillStyle;
    label(row.colour, `Colour of the vision guidance${layer.colour ? "" : own ? " (from the prompt)" : " (none yet)"}`);
    row.colour.classList.toggle("none", !own);
    label(row.auto, "Take the colour from the prompt again");
    row.auto.hidden = !layer.colour;
    const percent = percentOf(layer);
    row.opacity.value = percent;
    row.percent.textContent = `${percent} %`;
    row.opacity.setAttribute("aria-label", `Opacity: ${name}`);
    row.opacity.setAttribute("aria-valuetext", `${percent} %`);
    row.glass.hidden = percent === 100 && layer.id !== this.selected;
  }

  // ---------------------------------------------------------------- pointer

  /** Where on the canvas a pointer is, in [0, 1]. */
  at(event) {
    const place = this.svg.getBoundingClientRect();
    return [clamp((event.clientX - place.left) / place.width, 0, 1), clamp((event.clientY - place.top) / place.height, 0, 1)];
  }

  /** The layers that can be taken hold of there, the front one first. */
  under(point) {
    return this.doc.layers.filter((layer) => {
      const box = isShown(layer) && !layer.locked && this.bounds(layer);
      return box && inside(point, box);
    }).reverse();
  }

  pointerDown(event) {
    if (this.gesture || event.button > 0) return; // a second finger, another button
    event.preventDefault();
    this.svg.focus({ preventScroll: true });
    this.svg.setPointerCapture(event.pointerId);
    const start = this.at(event);
    const { handle } = event.target.dataset;
    const found = this.over || event.shiftKey ? [] : this.under(start);
    if (this.tool !== "box") {
      if (this.tool === "eraser" && !this.layer) this.selected = this.under(start)[0]?.id ?? null;
      this.gesture = { kind: "stroke", points: [start] };
    } else if (handle) {
      this.gesture = { kind: "resize", id: this.selected, from: this.bounds(this.layer), handle, start };
    } else if (found.length) {
      // What is selected is moved, also where something lies in front of it; a click without a
      // movement goes on to what lies behind.
      const held = found.find((layer) => layer.id === this.selected) ?? found[0];
      const next = held.id === this.selected ? found[(found.indexOf(held) + 1) % found.length] : held;
      this.select(held.id);
      this.gesture = { kind: "move", id: held.id, from: this.bounds(held), start, next: next.id };
    } else {
      this.gesture = { kind: "draw", start };
    }
    this.gesture.pointer = event.pointerId;
    this.draw();
  }

  pointerMove(event) {
    const point = this.at(event);
    if (this.tool !== "box") this.cursor = point;
    const { gesture } = this;
    if (!gesture || event.pointerId !== gesture.pointer) return this.tool !== "box" && this.drawScene();
    if (gesture.kind === "stroke") {
      gesture.points.push(...(event.getCoalescedEvents?.() ?? []).map((each) => this.at(each)), point);
    } else {
      const [dx, dy] = point.map((value, i) => value - gesture.start[i]);
      const far = Math.hypot(dx * this.size[0], dy * this.size[1]) > 3;
      if (!far && !gesture.box) return null;
      gesture.box = this.gridded(gesture, dx, dy, point);
    }
    return this.drawScene();
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

  pointerUp(event) {
    const { gesture } = this;
    if (!gesture || event.pointerId !== gesture.pointer) return;
    this.gesture = null;
    const box = gesture.box?.map(tidy);
    if (gesture.kind === "stroke") this.stroke(gesture.points);
    else if (gesture.kind === "draw") {
      if (box && box[2] - box[0] >= LEAST && box[3] - box[1] >= LEAST) this.add({ box });
      else { // of no area: a click beside everything
        this.select(null);
        this.say(box ? "Drag further, in both directions, to make a box." : "");
      }
    } else if (box) this.place(gesture.id, box);
    else if (gesture.kind === "move") this.select(gesture.next);
    this.draw();
  }

  endGesture() {
    if (!this.gesture) return;
    this.gesture = null;
    this.draw();
  }

  /** Drag a row of the list to another place. */
  dragRow(event, id) {
    if (event.button > 0) return;
    const { element, grip } = this.rows.get(id);
    grip.setPointerCapture(event.pointerId);
    const others = [...this.list.children].filter((row) => row !== element);
    let target = [...this.list.children].indexOf(element);
    element.classList.add("dragged");
    const move = ({ clientY }) => {
      element.style.transform = `translateY(${clientY - event.clientY}px)`;
      target = others.filter((row) => {
        const { top, height } = row.getBoundingClientRect();
        return clientY > top + height / 2;
      }).length;
      others.forEach((row, i) => {
        row.classList.toggle("before", i === target);
        row.classList.toggle("after", i === target - 1 && target === others.length);
      });
    };
    const end = ({ type }) => {
      for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) grip.removeEventListener(name, end);
      grip.removeEventListener("pointermove", move);
      element.classList.remove("dragged");
      element.style.transform = "";
      for (const row of others) row.classList.remove("before", "after");
      const index = this.doc.layers.findIndex((layer) => layer.id === id);
      if (type !== "pointerup") return;
      this.select(id);
      this.reorder(id, this.doc.layers.length - 1 - target - index);
    };
    grip.addEventListener("pointermove", move);
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) grip.addEventListener(name, end);
  }

  // ---------------------------------------------------------------- keyboard

  keyDown(event) {
    event.stopPropagation(); // not the notebook's
    if (event.isComposing || event.keyCode === 229) return null; // an input method's; Safari says only 229
    const typing = event.target.matches("input:not([type=color]):not([type=range]), textarea");
    if (event.key === "Escape") return this.escape();
    if (typing) {
      if (event.key === "Enter" && event.target.matches(".prompt")) this.svg.focus();
      return null;
    }
    const done = this.command(event);
    if (done) event.preventDefault();
    return done;
  }

  /** What a key does; whether it does anything. */
  command(event) {
    const { key, shiftKey } = event;
    const control = event.ctrlKey || event.metaKey;
    const act = (action) => { action(); return true; };
    const low = key.toLowerCase();
    if (key === "[" || key === "]") return act(() => this.reorder(this.selected, key === "]" ? 1 : -1)); // before Ctrl: AltGr+8
    if (control && low === "z") return act(() => shiftKey ? this.redo() : this.undo());
    if (control && low === "y") return act(() => this.redo());
    if (control && low === "d") return act(() => this.duplicate(this.selected));
    if (control || event.altKey) return false;
    if (key === "Delete" || key === "Backspace") return act(() => this.remove(this.selected));
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    const grip = event.target.closest(".grip");
    if (grip && arrow?.[1]) return act(() => this.reorder(grip.closest("[data-layer]").dataset.layer, -arrow[1]));
    const tool = { b: "box", p: "brush", e: "eraser" }[low];
    if (tool) return act(() => this.use(tool));
    if (event.target !== this.svg) return false;
    if (arrow) return act(() => this.arrow(arrow, shiftKey));
    if (key === "PageUp" || key === "PageDown") return act(() => this.selectNext(key === "PageUp" ? 1 : -1));
    if (this.tool !== "box" && (key === "Enter" || key === " ")) return act(() => this.stroke([this.cursor]));
    if (key === "Enter") return act(() => this.layer ? this.rows.get(this.selected).prompt.focus() : this.add({ box: [0.3, 0.3, 0.7, 0.7] }));
    if (low === "n") return act(() => this.add({ box: [0.3, 0.3, 0.7, 0.7] }));
    return false;
  }

  arrow([dx, dy], resize) {
    const step = this.snap ? this.step : [0.01, 0.01];
    if (this.tool !== "box") {
      this.cursor = this.cursor.map((value, i) => clamp(value + 2 * [dx, dy][i] * step[i], 0, 1));
      return this.draw();
    }
    const box = this.layer && this.bounds(this.layer);
    if (!box || this.layer.locked) return null;
    const next = resize ? resized(box, "se", dx * step[0], dy * step[1], step) : moved(box, dx * step[0], dy * step[1]);
    return this.place(this.selected, next.map(tidy), `arrow ${this.selected} ${resize}`, 150);
  }

  escape() {
    if (!this.drawer.hidden) return this.closeDrawer();
    if (this.gesture) return this.endGesture();
    this.svg.focus({ preventScroll: true });
    return this.select(null);
  }

  use(tool) {
    this.tool = tool;
    this.say("");
  }

  select(id) {
    if (id === this.selected) return;
    this.selected = id;
    this.history.lastKey = null;
    this.draw();
  }

  selectNext(step) {
    const { layers } = this.doc;
    if (!layers.length) return;
    const index = layers.findIndex((layer) => layer.id === this.selected);
    this.select(layers[(index + step + layers.length + (index < 0 && step < 0 ? 1 : 0)) % layers.length].id);
  }

  // ---------------------------------------------------------------- edits

  /** Make `doc` the document. Python hears of it at once, or `delay` ms after the last of a row. */
  edit(doc, key = null, delay = 0) {
    this.history.edit(doc, key);
    clearTimeout(this.timer);
    this.timer = null;
    if (delay) this.timer = setTimeout(() => this.send(), delay);
    else this.send();
  }

  /** The document is another: by an edit here or in another view, by undo or by Python. */
  follow() {
    if (!this.layer) this.selected = null;
    this.notice = { text: "", mark: [] };
    this.draw();
  }

  /** The end of a row of edits (a field was left): Python hears of it now. */
  settle() {
    this.history.lastKey = null;
    if (this.timer) this.send();
  }

  undo() {
    if (this.history.travel(this.history.past, this.history.future)) this.send();
  }

  redo() {
    if (this.history.travel(this.history.future, this.history.past)) this.send();
  }

  edited(layers, key, delay) {
    this.edit({ ...this.doc, layers }, key, delay);
  }

  change(id, changes, key, delay) {
    this.edited(this.doc.layers.map((layer) => {
      if (layer.id !== id) return layer;
      const next = { ...layer, ...changes };
      for (const name of Object.keys(next)) if (next[name] === undefined) delete next[name];
      return next;
    }), key, delay);
  }

  add(shape, prompt = "") {
    const layer = { id: randomName(), prompt, ...shape, hidden: false, locked: false };
    this.selected = layer.id;
    this.edited([...this.doc.layers, layer]);
    if (!prompt) this.rows.get(layer.id).prompt.focus({ preventScroll: true }); // it is typed next
  }

  /** Put a layer's box, or its mask, where `box` is. */
  place(id, box, key, delay) {
    const layer = this.doc.layers.find((each) => each.id === id);
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

  remove(id) {
    const layer = this.doc.layers.find((each) => each.id === id);
    if (!layer) return;
    if (layer.locked) return this.say("This layer is locked.", true);
    const held = this.root.contains(this.root.getRootNode().activeElement);
    this.edited(this.doc.layers.filter((each) => each !== layer));
    this.say(`Deleted ${layer.prompt || "the layer"}; Ctrl+Z brings it back.`);
    if (held) this.svg.focus({ preventScroll: true });
  }

  duplicate(id) {
    const layer = this.doc.layers.find((each) => each.id === id);
    const box = layer && this.bounds(layer);
    if (!box) return;
    const { id: _, mask, ...rest } = layer;
    const shifted = moved(box, box[2] > 0.95 ? -0.05 : 0.05, box[3] > 0.95 ? -0.05 : 0.05).map(tidy);
    const copy = { ...rest, ...(mask ? { mask: this.masks.fitted(mask, shifted) } : { box: shifted }) };
    this.add({ ...copy, locked: false }, layer.prompt);
  }

  /** Move a layer `by` places towards the front. */
  reorder(id, by) {
    const layers = [...this.doc.layers];
    const index = layers.findIndex((layer) => layer.id === id);
    const target = clamp(index + by, 0, layers.length - 1);
    if (index < 0 || target === index) return;
    layers.splice(target, 0, ...layers.splice(index, 1));
    this.edited(layers);
    this.say(`Now layer ${target + 1} of ${layers.length}${target === layers.length - 1 ? ", in front" : target ? "" : ", at the back"}.`);
  }

  say(text, warn = false, mark = []) {
    this.notice = { text, warn, mark };
    this.draw();
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
    const href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    h("a", { href, download: "layout.json" }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10000);
    return this.say("Saved as layout.json.");
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

  // ---------------------------------------------------------------- Python

  listen() {
    const { model } = this;
    this.heard = {
      "change:document": () => this.follow(),
      "change:snap": () => this.draw(),
      "change:_picture": () => this.draw(),
      "msg:custom": (message) => {
        if (message.kind === "ask") this.send(message.question);
        if (message.kind === "notice") this.say(message.text, true, message.mark);
        if (message.kind === "loaded") {
          this.drawer.hidden = true;
          this.say("Loaded.");
        }
        if (message.kind === "received" && message.number === this.number) {
          this.answered = message.number;
          this.root.dataset.synced = "true"; // Python has all that is drawn
          this.lost.hidden = true;
        }
      },
      comm_live_update: () => this.ask({ kind: "hello" }, 500), // ipywidgets 8: the kernel went away
    };
    for (const [name, listener] of Object.entries(this.heard)) model.on(name, listener);
  }

  /** Python gets the draft by a message. ipywidgets holds a second `save_changes` back until the
   *  first one is answered, so that a click on Render, or a cell run right after an edit, would
   *  overtake it; messages stay in order. Python may also have asked for it, by a question's number. */
  send(question = null) {
    clearTimeout(this.timer);
    this.timer = null;
    this.ask({ kind: "edit", document: this.doc, snap: this.snap, question });
  }

  /** Send a message with a number; Python answers with the same number, or is gone. */
  ask(message, patience = 5000) {
    const number = (this.number = Math.random().toString(36).slice(2));
    const gone = () => {
      if (number !== this.number || this.answered === number) return;
      this.lost.textContent = "Python does not answer: it is busy, or was restarted. What you drew is still here; “Copy as Python” and download work without it.";
      this.lost.hidden = false;
    };
    this.root.dataset.synced = "false";
    clearTimeout(this.patience);
    this.patience = setTimeout(gone, patience);
    try {
      this.model.send({ ...message, number });
    } catch {
      gone(); // the line itself is closed
    }
  }

  close() {
    if (this.timer) this.send();
    clearTimeout(this.patience);
    this.leaveTheme();
    for (const [name, listener] of Object.entries(this.heard)) this.model.off(name, listener);
  }
}

// ------------------------------------------------------------------ 7 what anywidget calls

/** Called once for each BoxEditor of Python; `render` then for each cell that shows it. */
export default () => {
  let history = null;
  return {
    initialize({ model }) {
      history = new History(model);
    },
    render({ model, el }) {
      const editor = new Editor(model, el, history);
      return () => editor.close();
    },
  };
};
