// What curves.js and completions.js share. Whatever a run wrote goes in as text nodes, never as markup.
"use strict";

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const percent = (share) => (share < 0.001 ? "under 0.1" : (100 * share).toPrecision(share < 0.0995 ? 2 : 3)) + "%";
const signed = (value) => (value > 0 ? "+" : "") + shortened(value).replace("-", "−");
const shortened = (value) => String(Number(value.toFixed(3)));

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// What has no shape of its own or turns its neighbours around is shown by its number.
const ODD = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffc\ud800-\udfff]/gu;
const visible = (text) => text.replace(ODD, (letter) => `‹${letter.codePointAt(0).toString(16)}›`);
