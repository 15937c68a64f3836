// The page of StackEditor (stack_editor.py), behind layer_editor.js.
//
// Each layer has a `picture` (its name in `_pictures`), `made` (the prompt it was made from), an
// `offset` in pixels of the stack, `hidden`, and an `opacity` where it is not 1. The page itself lays
// the layers over each other, so that what is dragged is seen at once; Python only hears where it
// was left.

const SOLID = 128; // from this alpha on a pixel belongs to its layer, as in Python
const STEP = 1, FAR = 8; // pixels that an arrow key moves a layer; with Shift

/** Pictures by their names, decoded: {canvas, alpha: of each pixel, box: around what is solid}. */
class Pictures {
  constructor(model, onready) {
    this.model = model;
    this.onready = onready;
    this.decoded = new Map(); // null while one is decoded
  }

  uri(name) {
    return this.model.get("_pictures")[name] ?? "";
  }

  get(name) {
    if (!this.decoded.has(name) && this.uri(name)) {
      this.decoded.set(name, null);
      const image = new Image();
      image.onload = () => {
        this.decoded.set(name, this.read(image, image.naturalWidth, image.naturalHeight));
        this.onready();
      };
      image.src = this.uri(name);
    }
    return this.decoded.get(name) ?? null;
  }

  read(image, width, height) {
    const canvas = h("canvas", { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const { data } = context.getImageData(0, 0, width, height);
    const alpha = Uint8Array.from({ length: width * height }, (_, i) => data[4 * i + 3]);
    return { canvas, alpha, box: tightBox(width, height, (i) => alpha[i] >= SOLID) };
  }

  /** Paint what is solid in a picture into a small square canvas. */
  thumbnail(small, { canvas, box }) {
    const [x0, y0, x1, y1] = (box ?? [0, 0, 1, 1]).map((value, i) => value * [canvas.width, canvas.height][i % 2]);
    const context = small.getContext("2d"), scale = small.width / Math.max(x1 - x0, y1 - y0);
    const width = scale * (x1 - x0), height = scale * (y1 - y0);
    context.clearRect(0, 0, small.width, small.height);
    context.drawImage(canvas, x0, y0, x1 - x0, y1 - y0, (small.width - width) / 2, (small.height - height) / 2, width, height);
  }
}

/** Set an attribute only if it changes: a picture that is set again is decoded again, and blinks. */
function update(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
  }
}

class StackEditor extends Editor {
  invitation = "Page Up and Page Down select one, arrow keys move it.";
  kept = "What you see is still here.";
  drawnTraits = ["_pictures", "_job", "_harmonised"];

  constructor(model, el, history) {
    super(model, el, history);
    this.pixels = [model.get("width"), model.get("height")];
    this.pictures = new Pictures(model, () => this.draw());
    this.pieces = new Map(); // layer id → its picture on the canvas
    this.harmonised = ""; // the last picture of all layers
    this.looking = false; // whether it is shown in place of the layers
  }

  // ---------------------------------------------------------------- build: once

  build() {
    this.why = h("p", { class: "hint", id: `${this.name}-why` },
      "To re-generate layers and to harmonise them, give the editor a pipeline: StackEditor(stack, pipe).");
    this.why.hidden = this.model.get("_can_draw");
    const needs = this.why.hidden ? null : this.why.id;
    this.redrawButton = button("redraw", "Make the selected layer anew from its prompt; the others stay",
      () => this.want({ kind: "redraw", layer: this.selected }), { text: "Re-generate", "aria-describedby": needs });
    this.harmoniseButton = button("harmonise", "Make one coherent picture of all layers",
      () => this.want({ kind: "harmonise" }), { text: "Harmonise", "aria-describedby": needs });
    this.lookLabel = h("span");
    this.lookButton = h("button", { type: "button", onclick: () => this.look(!this.looking) }, icon("over"), this.lookLabel);
    const file = (kind, what) => button("download", `Download the layers as ${what}`,
      () => this.want({ kind: "export", suffix: `.${kind}` }), { text: kind.toUpperCase() });
    const toolbar = this.buildToolbar(
      h("div", { class: "group" }, this.redrawButton, this.harmoniseButton, this.lookButton),
      [file("psd", "a Photoshop file"), file("ora", "an OpenRaster file (Krita, GIMP)")]);
    this.jobText = h("span", { role: "status" });
    this.bar = h("progress", { "aria-label": "Progress", max: 1 });
    this.job = h("div", { class: "job" }, this.jobText, this.bar);

    const [width, height] = this.size, whole = { width, height, preserveAspectRatio: "none" };
    this.ground = h("image", whole);
    this.scene = h("g");
    this.frame = h("g", { class: "outline" }, h("rect"), h("rect", { class: "dashes" }));
    this.result = h("image", whole);
    this.buildPage("Layer editor", [toolbar, this.why, this.job], [this.ground, this.scene, this.frame, this.result]);
    this.svg.classList.add("stack");
    this.groundThumb = h("canvas", { width: 68, height: 68 });
    this.list.after(h("div", { class: "ground" }, h("span", { class: "thumb" }, this.groundThumb), "Background"));
  }

  buildRow(id) {
    const row = super.buildRow(id);
    row.chip.classList.add("thumb");
    row.chip.append(row.thumb = h("canvas", { width: 68, height: 68 }));
    return row;
  }

  // ---------------------------------------------------------------- draw: after every change

  draw() {
    const job = this.model.get("_job"), busy = Boolean(job.text), able = this.model.get("_can_draw") && !busy;
    this.redrawButton.disabled = !able || !this.layer;
    this.harmoniseButton.disabled = !able;
    this.job.hidden = !busy;
    this.jobText.textContent = job.text ?? "";
    if (job.share == null) this.bar.removeAttribute("value"); // it has begun
    else this.bar.value = job.share;
    const harmonised = this.model.get("_harmonised");
    if (harmonised !== this.harmonised) this.looking = Boolean(harmonised);
    this.harmonised = harmonised;
    this.lookButton.hidden = !harmonised;
    this.lookLabel.textContent = this.looking ? "Back to the layers" : "Harmonised picture";
    this.hint.textContent = this.doc.layers.length ? "" : "No layer is left; Ctrl+Z brings the last one back.";
    this.drawThumbnail(this, "groundThumb", this.doc.ground);
    super.draw();
  }

  drawScene() {
    const [w, t] = this.size;
    update(this.ground, { href: this.pictures.uri(this.doc.ground) });
    keyed(this.scene, this.pieces, this.doc.layers.filter(isShown),
      (id) => ({ element: h("image", { "data-layer": id, width: w, height: t, preserveAspectRatio: "none" }) }),
      ({ element }, layer) => {
        const [x, y] = this.offsetNow(layer).map((value, i) => value / this.pixels[i] * this.size[i]);
        update(element, { href: this.pictures.uri(layer.picture), x, y, opacity: layer.opacity ?? 1 });
      });
    const box = this.layer && isShown(this.layer) && !this.looking && this.bounds(this.layer);
    this.frame.style.display = box ? "" : "none";
    if (box) for (const rect of this.frame.children) update(rect, this.rect(box));
    if (this.harmonised) update(this.result, { href: this.harmonised });
    this.result.style.display = this.looking ? "" : "none";
  }

  drawRow(row, layer) {
    this.drawThumbnail(row, "thumb", layer.picture);
    return super.drawRow(row, layer);
  }

  drawThumbnail(owner, name, of) {
    const picture = this.pictures.get(of);
    if (!picture || owner[name].shows === of) return;
    owner[name].shows = of;
    this.pictures.thumbnail(owner[name], picture);
  }

  hintText() {
    if (this.looking) return "The harmonised picture; an edit goes back to the layers.";
    const edited = this.layer && this.layer.prompt !== this.layer.made && this.model.get("_can_draw");
    return edited ? "Re-generate makes the layer anew from its new prompt." : super.hintText();
  }

  offsetNow(layer) {
    return (this.gesture?.id === layer.id && this.gesture.offset) || layer.offset;
  }

  /** The box in [0, 1] of what is solid where it is now; it may reach beyond the canvas. */
  bounds(layer) {
    const box = this.pictures.get(layer.picture)?.box;
    if (!box) return null;
    const by = this.offsetNow(layer).map((value, i) => value / this.pixels[i]);
    return box.map((value, i) => value + by[i % 2]);
  }

  // ---------------------------------------------------------------- pointer

  /** The shown layers that are solid there, the front one first. */
  under(point) {
    return this.doc.layers.filter((layer) => {
      const picture = isShown(layer) && this.pictures.get(layer.picture);
      if (!picture) return false;
      const { width, height } = picture.canvas;
      const [x, y] = point.map((value, i) => Math.floor((value - layer.offset[i] / this.pixels[i]) * [width, height][i]));
      return x >= 0 && x < width && y >= 0 && y < height && picture.alpha[y * width + x] >= SOLID;
    }).reverse();
  }

  gestureAt(start) {
    this.looking = false;
    const held = this.hold(this.under(start), start);
    return held ? { ...held, from: this.layer.offset } : { kind: "aside", start };
  }

  pointerMove(event) {
    const point = this.at(event), { gesture } = this;
    if (!gesture) this.svg.style.cursor = !this.looking && this.under(point).length ? "move" : "";
    if (gesture?.kind !== "move" || event.pointerId !== gesture.pointer) return;
    const by = this.shift(gesture, point);
    if (!by) return;
    gesture.offset = this.onCanvas(this.layerOf(gesture.id), gesture.from.map((value, i) => value + by[i] * this.pixels[i]));
    this.drawScene();
  }

  /** An offset in whole pixels with which the middle of the layer stays on the canvas. */
  onCanvas(layer, offset) {
    const box = this.pictures.get(layer.picture).box;
    return offset.map((value, i) => {
      const middle = (box[i] + box[i + 2]) / 2 * this.pixels[i];
      return Math.round(clamp(value, -middle, this.pixels[i] - middle));
    });
  }

  finish({ id, offset, next = null }) {
    if (!offset) this.select(next);
    else if (this.layerOf(id)) this.change(id, { offset });
  }

  arrow([dx, dy], far) {
    const { layer } = this;
    if (!layer || !this.bounds(layer)) return;
    const step = far ? FAR : STEP, [x, y] = layer.offset;
    this.change(layer.id, { offset: this.onCanvas(layer, [x + step * dx, y + step * dy]) }, `arrow ${layer.id}`, 150);
  }

  look(looking) {
    this.looking = looking;
    this.draw();
  }

  // ---------------------------------------------------------------- Python

  /** Ask Python for something that is made from the layers as they are here. */
  want(message) {
    this.settle();
    this.svg.focus({ preventScroll: true }); // buttons that are switched off lose the focus
    this.wanted = this.ask(message);
  }

  hear(message, buffers) {
    if (message.kind === "file" && message.number === this.wanted) { // not another view's
      this.save(message.name, buffers[0], "application/octet-stream");
    }
  }
}

export default widgetOf(StackEditor);
