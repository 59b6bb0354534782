// Drives the demo page in headless Chromium as a visitor would, and says what is wrong with it.
//
//     npm install puppeteer-core axe-core && apt install chromium
//     NODE_PATH=node_modules node scripts/check_app.js http://127.0.0.1:7860 photo.jpg [--screenshots DIR]
//
// Uploads the photograph, predicts, moves the mouse over every result. One line of JSON: milliseconds from the click to the
// last picture, the values that were shown for each place, messages of the console, requests to other machines, findings
// of axe-core. The exit status is 1 if anything is wrong.
const fs = require("fs");
const path = require("path");
const puppeteer = require("puppeteer-core");
const axe = require("axe-core");

const SERIOUS = ["serious", "critical"];
const LONGEST = 180000;
const told = () => [...document.querySelectorAll(".value li")].map((one) => one.innerText).join("\n");

(async () => {
  const given = process.argv.slice(2);
  const at = given.indexOf("--screenshots");
  const [, folder] = at < 0 ? [] : given.splice(at, 2);
  const [address, photograph] = given;
  const found = { console: [], requests: [], axe: [] };
  const browser = await puppeteer.launch({
    executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: ["--no-sandbox", "--use-angle=swiftshader",
      "--enable-unsafe-swiftshader"] });
  const page = await browser.newPage();
  await page.setBypassCSP(true);
  await page.setViewport({ width: 1280, height: 1400 });
  page.on("console", (message) => message.type() === "error" && !/WebGPU/.test(message.text()) && found.console.push(message.text()));
  page.on("pageerror", (error) => found.console.push(String(error)));
  page.on("request", (request) => {
    const { protocol, host } = new URL(request.url());
    if (/^(http|ws)/.test(protocol) && host !== new URL(address).host) found.requests.push(request.url());
  });
  const shot = async (name) => folder && page.screenshot({ path: path.join(folder, `${name}.png`), fullPage: true });
  await page.goto(address, { waitUntil: "load", timeout: LONGEST });
  await page.waitForSelector("#start", { timeout: LONGEST });
  await shot("app_empty");
  const input = await page.waitForSelector("#photograph input[type=file]", { timeout: LONGEST });
  await input.uploadFile(path.resolve(photograph));
  await page.waitForSelector("#photograph img", { timeout: LONGEST });
  const start = Date.now();
  await page.click("#start");
  await page.waitForFunction(() => {
    const pictures = [...document.querySelectorAll(".result")];
    return pictures.length > 0 && pictures.every((one) => one.querySelector("img"));
  }, { timeout: LONGEST });
  found.ms = Date.now() - start;
  await new Promise((done) => setTimeout(done, 30000));                 // the surface is drawn, by software
  await shot("app_result");
  found.values = {};
  for (const [number, picture] of (await page.$$(".result img")).entries()) {
    const before = await page.evaluate(told);
    await picture.scrollIntoView();
    const { x, y, width, height } = await picture.boundingBox();
    const [across, down] = [0.2 + 0.05 * number, 0.6];
    await page.mouse.move(x + width * across, y + height * down);
    await page.waitForFunction(`(${told})() && (${told})() !== ${JSON.stringify(before)}`, { timeout: LONGEST });
    found.values[`${await picture.evaluate((one) => one.alt)} at ${across.toFixed(2)}, ${down}`] =
      [...new Set((await page.evaluate(told)).split("\n"))].filter((line) => !before.includes(line));
  }
  await page.evaluate(axe.source);
  const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  for (const { id, impact, nodes } of violations) {
    found.axe.push({ id, impact, nodes: nodes.length, first: nodes[0].html.slice(0, 200) });
  }
  await page.setViewport({ width: 390, height: 844 });
  await new Promise((done) => setTimeout(done, 1000));
  await shot("app_phone");
  await browser.close();
  found.wrong = found.console.length + found.requests.length + found.axe.filter((one) => SERIOUS.includes(one.impact)).length;
  console.log(JSON.stringify(found));
  process.exit(found.wrong ? 1 : 0);
})();
