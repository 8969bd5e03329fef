// Asks the server one question twice, with the experts and without, and shows both answers as they come.

import { showRoute } from "./routing.js";

const LONGEST_SIDE = 1024;
const at = (id) => document.getElementById(id);
let image = null; // data URL of the chosen picture
let standing = ""; // what the status says while nothing is wrong
let running = null; // AbortController of the question that is being answered

async function start() {
  try {
    await showModels();
    await showExamples();
  } catch (error) {
    at("status").textContent = told(error);
  }
}

async function showModels() {
  const listed = (await (await fetch("v1/models")).json()).data.map((model) => model.id);
  const experts = listed.filter((id) => id.startsWith("cram:"));
  const options = [option("cram", "experts chosen by the question")];
  options.push(...experts.map((id) => option(id, `${id.slice(5)} alone`)));
  at("model").replaceChildren(...options);
  standing = experts.length === 1 ? "1 expert" : `${experts.length} experts`;
  settle();
}

function settle() {
  if (standing) at("status").textContent = standing;
}

function option(value, text) {
  const found = document.createElement("option");
  found.value = value;
  found.textContent = text;
  return found;
}

async function showExamples() {
  const examples = (await (await fetch("v1/cram/examples")).json()).data;
  at("examples").replaceChildren(...examples.map(offer));
  at("offers").hidden = !examples.length;
}

function offer(example) {
  const button = document.createElement("button");
  button.type = "button";
  const picture = document.createElement("img");
  picture.src = example.image;
  picture.alt = "";
  const text = document.createElement("span");
  text.textContent = example.question;
  button.append(picture, text);
  button.title = example.task;
  button.addEventListener("click", () => {
    choose(example.image);
    at("question").value = example.question;
    ask();
  });
  const item = document.createElement("li");
  item.append(button);
  return item;
}

function choose(url) {
  image = url;
  settle();
  at("clear").hidden = !url;
  at("picture").hidden = !url;
  at("hint").hidden = Boolean(url);
  at("picture").onload = () => at("picture").classList.toggle("small", at("picture").naturalWidth < 128);
  if (url) at("picture").src = url;
  else at("picture").removeAttribute("src");
}

async function take(file) {
  if (!file) return;
  try {
    choose(await asDataUrl(file));
  } catch {
    at("status").textContent = `${file.name} is no picture that this browser can read.`;
  }
}

// Large pictures are made smaller here: the model sees no more, and the server takes no large bodies.
async function asDataUrl(file) {
  const picture = await createImageBitmap(file);
  const scale = Math.min(1, LONGEST_SIDE / Math.max(picture.width, picture.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  const context = canvas.getContext("2d");
  // A JPEG has no transparency; the server shows what is transparent on white too.
  context.fillStyle = "white";
  if (scale < 1) context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  return scale < 1 ? canvas.toDataURL("image/jpeg", 0.92) : canvas.toDataURL("image/png");
}

async function ask() {
  const question = at("question").value.trim();
  if (!question) {
    at("question").focus();
    at("status").textContent = "Please write a question first.";
    return;
  }
  settle();
  if (running) running.abort();
  at("answers").hidden = false;
  const mine = (running = new AbortController());
  busy(true);
  at("ask").scrollIntoView({ block: "start" });
  at("routing").hidden = true;
  const chosen = at("model");
  at("experts-title").textContent = chosen.value === "cram" ? "With experts" : chosen.selectedOptions[0].text;
  const content = [{ type: "text", text: question }];
  if (image) content.unshift({ type: "image_url", image_url: { url: image } });
  const asked = [{ role: "user", content }];
  const route = (decision) => showRoute(decision, at("routing"));
  await Promise.all([
    answer(chosen.value, asked, "answer", mine, route),
    answer("base", asked, "base", mine, () => {}),
  ]);
  if (running === mine) {
    running = null;
    busy(false);
  }
}

async function answer(model, messages, place, controller, decided) {
  say(place, "");
  at(`${place}-time`).textContent = "";
  const began = performance.now();
  let first = null;
  let tokens = 0;
  try {
    for await (const chunk of stream({ model, messages, stream: true }, controller.signal)) {
      if (controller !== running) return;
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.cram) decided(chunk.cram);
      for (const choice of chunk.choices) {
        if (choice.delta.role) continue;
        first ??= performance.now();
        tokens += 1;
        at(place).textContent += choice.delta.content || "";
      }
    }
    at(`${place}-time`).textContent = times(began, first, tokens);
    if (!at(place).textContent) at(place).textContent = "(an empty answer)";
  } catch (error) {
    if (error.name !== "AbortError") say(place, told(error), true);
    else if (controller === running) at(`${place}-time`).textContent = "stopped";
  }
}

// A browser's own words for a server that is gone are "Failed to fetch", "network error" and others.
function told(error) {
  return error instanceof TypeError ? "The server does not answer." : error.message;
}

function times(began, first, tokens) {
  if (first === null) return "";
  const rest = performance.now() - first;
  // The last tokens of a short answer come together.
  const each = tokens > 8 ? `, then ${(rest / (tokens - 1)).toFixed(1)} ms per token` : "";
  return `${tokens} tokens; the first after ${Math.round(first - began)} ms${each}`;
}

async function* stream(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify(body), signal };
  const reply = await fetch("v1/chat/completions", options);
  if (!reply.ok) throw new Error(await reason(reply));
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server has broken off the answer.");
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function reason(reply) {
  if (reply.status === 429) return "The server is busy. Please ask again in a moment.";
  try {
    return (await reply.json()).error.message;
  } catch {
    return `The server answered with status ${reply.status}.`;
  }
}

function say(place, text, fault = false) {
  at(place).textContent = text;
  at(place).classList.toggle("fault", fault);
}

function busy(now) {
  at("send").disabled = now;
  at("stop").hidden = !now;
  at("answers").classList.toggle("busy", now);
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("stop").addEventListener("click", () => running && running.abort());
at("clear").addEventListener("click", () => {
  choose(null);
  at("file").value = "";
});
at("file").addEventListener("change", () => take(at("file").files[0]));
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
document.addEventListener("paste", (event) => take([...event.clipboardData.files][0]));
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take([...event.dataTransfer.files][0]);
  });
}
start();
