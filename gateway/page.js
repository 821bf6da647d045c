// Sends what a reader tries to this gateway and shows its answer. The page is whole without it.
"use strict";

async function send(form) {
  let path = form.dataset.path;
  const query = new URLSearchParams();
  const headers = {};
  for (const input of form.querySelectorAll("input")) {
    if (input.dataset.in === "path") path = path.replace(`{${input.name}}`, encodeURIComponent(input.value));
    else if (input.value && input.dataset.in === "query") query.append(input.name, input.value);
    else if (input.value) headers[input.name] = input.value;
  }
  const body = form.querySelector("textarea")?.value;
  if (body !== undefined) headers["content-type"] = "application/json";
  const key = document.getElementById("key").value;
  if (key) headers.authorization = `Bearer ${key}`;
  const address = query.size ? `${path}?${query}` : path;
  const began = performance.now();
  const reply = await fetch(address, { method: form.dataset.method, headers, body });
  const text = await reply.text();
  const took = Math.round(performance.now() - began);
  return `${reply.status} ${reply.statusText}, ${took} ms\nx-request-id: ${reply.headers.get("x-request-id")}\n\n${pretty(text)}`;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

for (const form of document.forms) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const shown = document.createElement("pre");
    form.querySelector("output").replaceChildren(shown);
    shown.textContent = "...";
    try {
      shown.textContent = await send(form);
    } catch (error) {
      shown.textContent = `no answer: ${error.message}`;
    }
  });
}
