// The page of Guess (guess.py), after elements.js: one ES module, nothing to build.
//
// A guess is locked here at once, and Python is told. `chosen` is Python's answer to that.

const PATIENCE = 5000; // milliseconds

class Question {
  constructor(model, el) {
    this.model = model;
    this.mine = null; // what was locked here, and Python has not answered yet
    this.build(el);
    this.leaveTheme = followTheme(this.root, el);
    this.follow = () => this.draw();
    model.on("change:chosen", this.follow);
    this.draw();
  }

  get locked() {
    return this.model.get("chosen") ?? this.mine;
  }

  get marked() {
    return this.radios.findIndex((radio) => radio.checked);
  }

  build(el) {
    const answers = this.model.get("answers");
    const name = `guess-${Math.random().toString(36).slice(2)}`; // of this view alone
    this.radios = answers.map(() => h("input", { type: "radio", name, onchange: () => this.draw() }));
    this.notes = answers.map(() => h("span", { class: "note" }));
    this.group = h("fieldset", { role: "radiogroup" },
      h("legend", {}, h("strong", {}, "Guess first. "), this.model.get("question")),
      ...answers.map((answer, n) => h("label", {}, this.radios[n], h("span", {}, answer), this.notes[n])));
    this.button = h("button", { type: "button", onclick: () => this.lock() }, "Lock in");
    this.told = h("div", { class: "told", tabindex: "-1", hidden: "" });
    this.lost = h("p", { class: "lost", role: "alert", hidden: "" },
      "Python does not answer: it is busy, or was restarted. The summary may lack this guess.");
    this.root = h("div", { class: "lrd-widget lrd-guess", onkeydown: (event) => this.keyDown(event) },
      this.group, this.button, this.told, this.lost);
    el.append(this.root);
  }

  draw() {
    const { locked } = this;
    this.button.disabled = this.marked < 0;
    if (locked == null) return;
    const answers = this.model.get("answers");
    const right = this.model.get("answer");
    this.radios.forEach((radio, n) => {
      radio.checked = n === locked;
      const notes = [n === right && "✓ right answer", n === locked && `${n === right ? "" : "✗ "}your guess`];
      this.notes[n].textContent = notes.filter(Boolean).join(", ");
    });
    this.group.disabled = true;
    this.button.hidden = true;
    this.told.replaceChildren(
      h("strong", {}, locked === right
        ? `✓ Right: ${answers[right]}.`
        : `✗ Not so: you guessed “${answers[locked]}”, the answer is “${answers[right]}”.`),
      h("p", {}, this.model.get("why")));
    this.told.hidden = false;
    if (this.model.get("chosen") != null) this.lost.hidden = true;
  }

  lock() {
    if (this.marked < 0 || this.locked != null) return;
    this.mine = this.marked;
    const gone = () => { this.lost.hidden = this.model.get("chosen") != null; };
    this.patience = setTimeout(gone, PATIENCE);
    try {
      this.model.send({ kind: "lock", number: this.mine });
    } catch {
      gone(); // the line itself is closed
    }
    this.draw();
    this.told.focus({ preventScroll: true }); // so that a screen reader reads it
  }

  keyDown(event) {
    event.stopPropagation(); // not the notebook's
    if (event.key !== "Enter" || event.target.type !== "radio") return;
    event.preventDefault();
    if (event.repeat) return; // a key held down
    if (event.target.checked) this.lock();
    else event.target.click();
  }

  close() {
    clearTimeout(this.patience);
    this.leaveTheme();
    this.model.off("change:chosen", this.follow);
  }
}

export default {
  render({ model, el }) {
    const question = new Question(model, el);
    return () => question.close();
  },
};
