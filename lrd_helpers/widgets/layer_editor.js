// What the pages of BoxEditor and StackEditor share, behind elements.js and before each of them.
//
// In reading order: 1 buttons · 2 the document's history · 3 an editor of layers: build, draw,
// pointer, keyboard, edits, Python · 4 what anywidget calls.
//
// The document is a value: {caption, background, layers: [{id, prompt, …}]}, back to front. An
// edit makes a new one, so undo is a list of old ones and Python never sees half of one.

// ------------------------------------------------------------------ 1 buttons

const ICONS = {
  box: "M4 6h16v12H4zM4 6h.01M20 6h.01M4 18h.01M20 18h.01",
  ellipse: "M3 12a9 7 0 1 0 18 0 9 7 0 1 0-18 0z",
  brush: "M4 20c4 0 5-1.5 5-3.5S7 13.5 5.5 14.5 5.5 18.5 4 20zM8.5 14 18 4l2.5 2.5-9.5 10",
  eraser: "M9 19h11M4.5 15.5 13 6l6 5.5L12.5 19H8z",
  over: "M4 4h11v11H4zM9 9h11v11H9z",
  large: "M14 4h6v6M20 4l-7 7M10 20H4v-6M4 20l7-7",
  grid: "M4 4h16v16H4zM4 9.3h16M4 14.7h16M9.3 4v16M14.7 4v16",
  redraw: "M4 12a8 8 0 0 1 14-5l2 2M20 4v5h-5M20 12a8 8 0 0 1-14 5l-2-2M4 20v-5h5",
  harmonise: "M12 3l1.8 5.2L19 10l-5.2 1.8L12 17l-1.8-5.2L5 10l5.2-1.8zM19 16v4M17 18h4",
  add: "M12 5v14M5 12h14",
  starters: "M4 4h7v7H4zM13 4h7v7h-7zM4 13h7v7H4zM13 13h7v7h-7z",
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

/** Make the children of `parent` those of `layers`, in this order, and show each layer in its own.
 *  `held` has them by the layers' ids: {element, …}. They stay the elements they are: a prompt that
 *  is being typed must not be rebuilt under the hands. */
function keyed(parent, held, layers, make, show) {
  const ids = new Set(layers.map((layer) => layer.id));
  for (const [id, { element }] of held) {
    if (!ids.has(id)) { element.remove(); held.delete(id); }
  }
  layers.forEach((layer, position) => {
    if (!held.has(layer.id)) held.set(layer.id, make(layer.id));
    const { element } = held.get(layer.id), there = parent.children[position];
    if (there !== element) parent.insertBefore(element, there ?? null);
    show(held.get(layer.id), layer);
  });
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const act = (action) => { action(); return true; };
const isShown = (layer) => !layer.hidden;
const spoken = (box) => ["left", "top", "right", "bottom"]
  .map((side, i) => `${side} ${Math.round(box[i] * 100)} %`).join(", ");
/** The tight box, in [0, 1], around the pixels (counted row by row) that are meant; null: none. */
function tightBox(width, height, meant) {
  const box = [width, height, 0, 0];
  for (let i = 0; i < width * height; i++) {
    if (!meant(i)) continue;
    const x = i % width, y = Math.floor(i / width);
    box[0] = Math.min(box[0], x);
    box[1] = Math.min(box[1], y);
    box[2] = Math.max(box[2], x + 1);
    box[3] = Math.max(box[3], y + 1);
  }
  return box[2] ? box.map((value, i) => value / (i % 2 ? height : width)) : null;
}

const percentOf = (layer) => Math.round(100 * (layer.opacity ?? 1));

// ------------------------------------------------------------------ 2 the document's history

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

// ------------------------------------------------------------------ 3 an editor of layers

/** A canvas and the list of its layers. Each kind of editor has besides
 *  - `build`, `drawScene` and `bounds` (a layer's box in [0, 1], or null),
 *  - `gestureAt`, `pointerMove` and `finish`: what a pointer does; `arrow`: what an arrow key does,
 *  - `invitation`, `kept` (sentences), `drawnTraits` (of Python: drawn anew when one changes),
 *    `sentTraits` (go to Python with the document) and `hear` (a message from Python). */
class Editor {
  constructor(model, el, history) {
    this.model = model;
    this.el = el;
    this.history = history;
    this.name = `lrd-${randomName()}`; // ids in the page start with it; a counter would be the module's, and each editor loads its own
    this.selected = null; // the id of a layer
    this.gesture = null;
    this.notice = { text: "", mark: [] };
    this.line = new Line(model, (there) => this.heardFrom(there));
    const width = model.get("width"), height = model.get("height");
    this.size = [width, height].map((side) => side * 400 / Math.max(width, height)); // in SVG units
    this.rows = new Map(); // layer id → its row in the list
  }

  /** Show it; what a kind of editor has of its own is there by now. */
  start() {
    this.build();
    this.listen();
    this.draw();
  }

  get doc() {
    return this.history.doc;
  }

  get layer() {
    return this.layerOf(this.selected);
  }

  layerOf(id) {
    return this.doc.layers.find((layer) => layer.id === id) ?? null;
  }

  numberOf(layer) {
    return this.doc.layers.indexOf(layer) + 1;
  }

  placeOf(layer) {
    return spoken(this.bounds(layer) ?? [0, 0, 1, 1]);
  }

  rect([x0, y0, x1, y1]) {
    const [w, t] = this.size;
    return { x: x0 * w, y: y0 * t, width: (x1 - x0) * w, height: (y1 - y0) * t };
  }

  get sentTraits() {
    return {};
  }

  // ---------------------------------------------------------------- build: once

  /** Put the page together: the toolbar and what stands below it, the canvas, and the list. */
  buildPage(label, above, drawn, more = []) {
    const [w, t] = this.size;
    this.svg = h("svg", {
      viewBox: `0 0 ${w} ${t}`, style: `--widest:${1.1 * w}px;--ratio:${w / t}`, class: "canvas",
      tabindex: 0, role: "application",
      "aria-roledescription": "canvas",
      onpointerdown: (event) => this.pointerDown(event),
      onpointermove: (event) => this.pointerMove(event),
      onpointerup: (event) => this.pointerUp(event),
      onpointercancel: () => this.endGesture(),
      onlostpointercapture: () => this.endGesture(),
    }, ...drawn);
    this.lost = h("div", { class: "lost", role: "alert", hidden: "" });
    this.status = h("div", { class: "status", role: "status", "aria-live": "polite" });
    this.root = h("div", {
      class: "lrd-widget lrd-fields lrd-editor", role: "group", "aria-label": label,
      onkeydown: (event) => this.keyDown(event),
    }, above[0], this.lost, ...above.slice(1), h("div", { class: "body" }, this.svg, this.buildSide(more)), this.status);
    this.el.append(this.root);
    this.leaveTheme = followTheme(this.root, this.el);
  }

  buildToolbar(...groups) {
    this.undoButton = button("undo", "Undo (Ctrl+Z)", () => this.undo());
    this.redoButton = button("redo", "Redo (Ctrl+Shift+Z)", () => this.redo());
    const end = groups.pop();
    return h("div", { class: "toolbar", role: "toolbar", "aria-label": "Tools" }, ...groups,
      h("div", { class: "group" }, this.undoButton, this.redoButton), h("div", { class: "group end" }, ...end));
  }

  /** The fields and the list of layers; `more` are buttons beside those that order them. */
  buildSide(more) {
    this.upButton = button("up", "Bring forward ( ] )", () => this.reorder(this.selected, 1));
    this.downButton = button("down", "Send backward ( [ )", () => this.reorder(this.selected, -1));
    this.trashButton = button("trash", "Delete (Delete)", () => this.remove(this.selected));
    this.list = h("ol", { class: "layers", "aria-label": "Layers, the front one first" });
    this.hint = h("p", { class: "hint" });
    return h("div", { class: "side" },
      this.buildField("caption", "Caption"), this.buildField("background", "Background"),
      h("div", { class: "listhead" }, h("span", {}, "Layers ", h("small", {}, "front first")),
        h("div", { class: "group" }, this.upButton, this.downButton, ...more, this.trashButton)),
      this.list, this.hint);
  }

  buildField(name, label) {
    const input = h("input", {
      type: "text", id: `${this.name}-${name}`, spellcheck: "false", autocomplete: "off",
      oninput: () => this.edit({ ...this.doc, [name]: input.value }, name, 300),
      onblur: () => this.settle(),
    });
    this[name] = input;
    return h("div", { class: "field" }, h("label", { for: input.id }, label), input);
  }

  /** A row of the list: what every layer has, and more before and behind its eye. */
  buildRow(id, before = {}, behind = {}) {
    const parts = {
      grip: button("grip", "", null, { class: "grip", onpointerdown: (event) => this.dragRow(event, id) }),
      chip: h("button", { type: "button", class: "chip", onclick: () => this.select(id) }),
      prompt: h("input", {
        type: "text", class: "prompt", spellcheck: "false", autocomplete: "off", placeholder: "what is here?",
        oninput: () => this.change(id, { prompt: parts.prompt.value }, `prompt ${id}`, 300),
        onblur: () => this.settle(),
        onfocus: () => this.select(id),
      }),
      ...before,
      hide: button("eye", "", () => this.change(id, { hidden: !this.layerOf(id).hidden })),
      ...behind,
    };
    const opacity = h("input", {
      type: "range", min: 0, max: 100, title: "Opacity: how much of what lies behind it hides",
      oninput: () => {
        const share = opacity.value / 100;
        this.change(id, { opacity: share < 1 ? share : undefined }, `opacity ${id}`, 300);
      },
      onchange: () => this.settle(),
    });
    const percent = h("span");
    const glass = h("label", { class: "glass" }, "Opacity", opacity, percent);
    const element = h("li", { "data-layer": id, onclick: () => this.select(id) }, ...Object.values(parts), glass);
    return { element, glass, opacity, percent, ...parts };
  }

  // ---------------------------------------------------------------- draw: after every change

  draw() {
    this.undoButton.disabled = !this.history.past.length;
    this.redoButton.disabled = !this.history.future.length;
    for (const name of ["caption", "background"]) {
      if (this[name].value !== this.doc[name]) this[name].value = this.doc[name];
    }
    this.drawScene();
    this.drawList();
    const { layer } = this, count = this.doc.layers.length;
    this.svg.setAttribute("aria-label", layer
      ? `Layer ${this.numberOf(layer)} of ${count}, ${layer.prompt || "no prompt"}, ${this.placeOf(layer)}`
      : `${count} layers. ${this.invitation}`);
    const text = this.notice.text || this.hintText();
    if (this.status.textContent !== text) this.status.textContent = text;
    this.status.classList.toggle("warn", Boolean(this.notice.warn));
  }

  hintText() {
    return this.layer ? `Layer ${this.numberOf(this.layer)}: ${this.placeOf(this.layer)}` : "";
  }

  drawList() {
    const focused = this.root.getRootNode().activeElement;
    keyed(this.list, this.rows, [...this.doc.layers].reverse(),
      (id) => this.buildRow(id), (row, layer) => this.drawRow(row, layer));
    // Moving an element in the page takes the focus from it.
    if (focused && this.list.contains(focused) && focused !== this.root.getRootNode().activeElement) focused.focus();
    const index = this.doc.layers.indexOf(this.layer);
    this.upButton.disabled = index < 0 || index === this.doc.layers.length - 1;
    this.downButton.disabled = index < 1;
    this.trashButton.disabled = index < 0;
  }

  /** Show a layer in its row; the answer gives elements of the row their titles and names. */
  drawRow(row, layer) {
    const number = this.numberOf(layer);
    const name = `layer ${number}${layer.prompt ? `, ${layer.prompt}` : ""}`;
    const label = (element, text) => { element.title = text; element.setAttribute("aria-label", `${text}: ${name}`); };
    row.element.classList.toggle("selected", layer.id === this.selected);
    row.element.classList.toggle("dim", Boolean(layer.hidden));
    row.element.classList.toggle("marked", this.notice.mark.includes(layer.id));
    label(row.chip, "Select");
    row.chip.setAttribute("aria-pressed", layer.id === this.selected);
    label(row.grip, "Drag, or use the arrow keys, to change the order");
    if (row.prompt.value !== layer.prompt) row.prompt.value = layer.prompt;
    row.prompt.setAttribute("aria-label", `Prompt of layer ${number}`);
    row.prompt.setAttribute("aria-invalid", this.notice.mark.includes(layer.id));
    // The icons stay the elements they are: a click on one that is replaced between press and
    // release is none.
    label(row.hide, layer.hidden ? "Show" : "Hide");
    row.hide.querySelector("path").setAttribute("d", ICONS[layer.hidden ? "hidden" : "eye"]);
    row.hide.classList.toggle("on", Boolean(layer.hidden));
    const percent = percentOf(layer);
    row.opacity.value = percent;
    row.percent.textContent = `${percent} %`;
    row.opacity.setAttribute("aria-label", `Opacity: ${name}`);
    row.opacity.setAttribute("aria-valuetext", `${percent} %`);
    row.glass.hidden = percent === 100 && layer.id !== this.selected;
    return label;
  }

  // ---------------------------------------------------------------- pointer

  /** Where on the canvas a pointer is, in [0, 1]. */
  at(event) {
    const place = this.svg.getBoundingClientRect();
    return [clamp((event.clientX - place.left) / place.width, 0, 1), clamp((event.clientY - place.top) / place.height, 0, 1)];
  }

  pointerDown(event) {
    if (this.gesture || event.button > 0) return; // a second finger, another button
    event.preventDefault();
    this.svg.focus({ preventScroll: true });
    this.svg.setPointerCapture(event.pointerId);
    this.gesture = { ...this.gestureAt(this.at(event), event), pointer: event.pointerId };
    this.draw();
  }

  /** Take hold of one of the layers `found` under the pointer (front first): a gesture, or null.
   *  What is selected is moved, also where something lies in front of it; a click without a
   *  movement goes on to what lies behind. */
  hold(found, start) {
    if (!found.length) return null;
    const held = found.find((layer) => layer.id === this.selected) ?? found[0];
    const next = held.id === this.selected ? found[(found.indexOf(held) + 1) % found.length] : held;
    this.select(held.id);
    return { kind: "move", id: held.id, start, next: next.id };
  }

  /** How far the pointer has gone in this gesture; null where a hand may only have trembled. */
  shift(gesture, point) {
    const by = point.map((value, i) => value - gesture.start[i]);
    gesture.far ||= Math.hypot(by[0] * this.size[0], by[1] * this.size[1]) > 3;
    return gesture.far ? by : null;
  }

  pointerUp(event) {
    const { gesture } = this;
    if (!gesture || event.pointerId !== gesture.pointer) return;
    this.gesture = null;
    this.finish(gesture);
    this.letGo();
    this.draw();
  }

  endGesture() {
    if (!this.gesture) return;
    this.gesture = null;
    this.letGo();
    this.draw();
  }

  /** The gesture is over, after what it did. */
  letGo() {}

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
    const low = key.toLowerCase();
    if (key === "[" || key === "]") return act(() => this.reorder(this.selected, key === "]" ? 1 : -1)); // before Ctrl: AltGr+8
    if (control && low === "z") return act(() => shiftKey ? this.redo() : this.undo());
    if (control && low === "y") return act(() => this.redo());
    if (control || event.altKey) return false;
    if (key === "Delete" || key === "Backspace") return act(() => this.remove(this.selected));
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    const grip = event.target.closest(".grip");
    if (grip && arrow?.[1]) return act(() => this.reorder(grip.closest("[data-layer]").dataset.layer, -arrow[1]));
    if (event.target !== this.svg) return false;
    if (arrow) return act(() => this.arrow(arrow, shiftKey));
    if (key === "Enter" && this.layer) return act(() => this.rows.get(this.selected).prompt.focus());
    if (key === "PageUp" || key === "PageDown") return act(() => this.selectNext(key === "PageUp" ? 1 : -1));
    return false;
  }

  escape() {
    if (this.gesture) return this.endGesture();
    this.svg.focus({ preventScroll: true });
    return this.select(null);
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

  remove(id) {
    const layer = this.layerOf(id);
    if (!layer) return;
    if (layer.locked) return this.say("This layer is locked.", true);
    const held = this.root.contains(this.root.getRootNode().activeElement);
    this.edited(this.doc.layers.filter((each) => each !== layer));
    this.say(`Deleted ${layer.prompt || "the layer"}; Ctrl+Z brings it back.`);
    if (held) this.svg.focus({ preventScroll: true });
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

  /** Give the reader a file. */
  save(name, content, type) {
    const href = URL.createObjectURL(new Blob([content], { type }));
    h("a", { href, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10000);
    this.say(`Saved as ${name}.`);
  }

  // ---------------------------------------------------------------- Python

  listen() {
    const { model } = this;
    this.heard = {
      "change:document": () => this.follow(),
      "msg:custom": (message, buffers) => {
        if (message.kind === "ask") this.send(message.question);
        if (message.kind === "notice") this.say(message.text, message.warn, message.mark);
        this.line.hear(message);
        this.hear(message, buffers);
      },
      comm_live_update: () => this.ask({ kind: "hello" }, 500), // ipywidgets 8: the kernel went away
    };
    for (const name of this.drawnTraits) this.heard[`change:${name}`] = () => this.draw();
    for (const [name, listener] of Object.entries(this.heard)) model.on(name, listener);
  }

  /** Python gets the draft by a message. ipywidgets holds a second `save_changes` back until the
   *  first one is answered, so that a click on Render, or a cell run right after an edit, would
   *  overtake it; messages stay in order. Python may also have asked for it, by a question's number. */
  send(question = null) {
    clearTimeout(this.timer);
    this.timer = null;
    this.ask({ kind: "edit", document: this.doc, ...this.sentTraits, question });
  }

  /** Send a message; its number. */
  ask(message, patience = 5000) {
    this.root.dataset.synced = "false";
    return this.line.send(message, patience);
  }

  /** Python has all that is drawn, or it does not answer. */
  heardFrom(there) {
    if (there) this.root.dataset.synced = "true";
    else this.lost.textContent = `Python does not answer: it is busy, or was restarted. ${this.kept}`;
    this.lost.hidden = there;
  }

  close() {
    if (this.timer) this.send();
    this.line.close();
    this.leaveTheme();
    for (const [name, listener] of Object.entries(this.heard)) this.model.off(name, listener);
  }
}

// ------------------------------------------------------------------ 4 what anywidget calls

/** What a module exports: called once for each widget of Python; `render` then for each cell that
 *  shows it. */
const widgetOf = (Kind) => () => {
  let history = null;
  return {
    initialize({ model }) {
      history = new History(model);
    },
    render({ model, el }) {
      const editor = new Kind(model, el, history);
      editor.start();
      return () => editor.close();
    },
  };
};
