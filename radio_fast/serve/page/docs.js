// openapi.json for people: of each operation what it takes and what it answers.
"use strict";

function element(tag, text, ...children) {
  const made = document.createElement(tag);
  made.textContent = text;
  made.append(...children);
  return made;
}

function list(rows) {
  const made = document.createElement("dl");
  for (const [name, ...texts] of rows) {
    made.append(element("dt", name), element("dd", texts.filter(Boolean).join(" · ")));
  }
  return made;
}

// A schema in words.
function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(kind).filter((one) => one !== "null").join(" or ");
  if (schema.enum) return schema.enum.join(", ");
  if (schema.type === "array") return `array of ${schema.items ? kind(schema.items) : "anything"}`;
  if (schema.additionalProperties) return `object of ${kind(schema.additionalProperties)}`;
  return schema.format ?? schema.const ?? schema.type ?? "anything";
}

function fields({ properties = {}, required = [] }) {
  return list(Object.entries(properties).map(([name, schema]) => [
    name, kind(schema), required.includes(name) && "required", schema.description,
  ]));
}

function operation(path, method, { description, parameters = [], requestBody, responses }) {
  const card = element("article", "", element("h2", `${method.toUpperCase()} ${path}`), element("p", description ?? ""));
  if (parameters.length) {
    card.append(element("h3", "Query"), list(parameters.map((one) => [one.name, kind(one.schema), one.description])));
  }
  for (const [type, { schema }] of Object.entries(requestBody?.content ?? {})) {
    card.append(element("h3", type), fields(schema));
  }
  card.append(element("h3", "Answers"), list(Object.entries(responses).map(([status, { description, content = {} }]) => [
    status, description,
    Object.entries(content).map(([type, { schema = {} }]) => `${type} ${schema.$ref ? kind(schema) : ""}`).join(", "),
  ])));
  return card;
}

fetch("openapi.json").then((answer) => answer.json()).then(({ paths, components }) => {
  const cards = Object.entries(paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, content]) => operation(path, method, content)));
  for (const [name, schema] of Object.entries(components.schemas)) {
    cards.push(element("article", "", element("h2", name), element("p", schema.description ?? ""), fields(schema)));
  }
  document.getElementById("operations").replaceChildren(...cards);
}).catch((error) => {
  document.getElementById("operations").textContent = `No description: ${error.message}`;
});
