// Drives the demo page in headless Chromium as a visitor would, and says what is wrong with it.
//
//     npm install puppeteer-core axe-core && apt install chromium
//     NODE_PATH=node_modules node scripts/check_app.js http://127.0.0.1:7860 photo.jpg [--screenshots DIR]
//
// Uploads the photograph, predicts, moves both sliders with the keyboard, saves the raw results, moves the mouse over every
// result. One line of JSON: milliseconds from the click to the last picture, how many pictures each slider painted anew,
// the files saved and their bytes, the values that were shown for each place, messages of the console, requests to other
// machines, findings of axe-core. The exit status is 1 if anything is wrong.
const fs = require("fs");
const os = require("os");
const path = require("path");
const puppeteer = require("puppeteer-core");
const axe = require("axe-core");

const SERIOUS = ["serious", "critical"];
const LONGEST = 180000;
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const told = () => [...document.querySelectorAll(".value li")].map((one) => one.innerText).join("\n");
// Of every result a number that its pixels make, once two looks have found the same.
async function painted(page, wanted, what) {
  let last = "";
  for (const start = Date.now(); Date.now() - start < LONGEST; await sleep(1000)) {
    const now = await page.$$eval(".result img", (all) => Promise.all(all.map(async (one) => {
      await one.decode();
      const { naturalWidth: width, naturalHeight: height } = one;
      const context = new OffscreenCanvas(width, height).getContext("2d");
      context.drawImage(one, 0, 0);
      return context.getImageData(0, 0, width, height).data.reduce((sum, value) => (31 * sum + value) >>> 0, 0);
    })));
    if (wanted(now) && last === String(now)) return now;
    last = String(now);
  }
  throw new Error(`${what}: not seen in ${LONGEST / 1000} s`);
}

// Opacity 0 is the photograph, in every picture the same; 1 is what was there; a threshold changes probabilities alone.
async function slide(page) {
  const [opacity, threshold] = await page.$$("input[type=range]");
  const differ = (a, b) => a.filter((one, i) => one !== b[i]).length;
  const before = await painted(page, () => true, "the results");
  await opacity.press("Home");
  const none = await painted(page, (now) => new Set(now).size === 1, "the photograph at opacity 0");
  await opacity.press("End");
  await painted(page, (now) => !differ(now, before), "the first pictures again at opacity 1");
  await threshold.press("End");
  const cut = await painted(page, (now) => differ(now, before) > 0, "pictures cut at a threshold");
  await threshold.press("Home");
  await painted(page, (now) => !differ(now, before), "the first pictures again without a threshold");
  return { pictures: before.length, opacity: differ(none, before), threshold: differ(cut, before) };
}

// Clicks every download of raw results: the files' names and bytes.
async function save(page, folder) {
  await (await page.createCDPSession()).send("Browser.setDownloadBehavior", { behavior: "allow", downloadPath: folder });
  const buttons = await page.$$("::-p-xpath(//*[self::button or self::a][contains(., 'Raw results')])");
  const saved = () => fs.readdirSync(folder).filter((name) => name.endsWith(".zip"));
  for (const [number, button] of buttons.entries()) {
    await button.click();
    for (const start = Date.now(); saved().length <= number; await sleep(500)) {
      if (Date.now() - start > LONGEST) throw new Error(`download ${number + 1} of ${buttons.length} did not come`);
    }
  }
  return Object.fromEntries(saved().map((name) => [name, fs.statSync(path.join(folder, name)).size]));
}

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
  await sleep(30000);                                                   // the surface is drawn, by software
  await shot("app_result");
  found.repainted = await slide(page);
  found.saved = await save(page, folder ? path.resolve(folder) : fs.mkdtempSync(path.join(os.tmpdir(), "check_app_")));
  found.values = {};
  for (const [number, picture] of (await page.$$(".result img")).entries()) {
    const before = await page.evaluate(told);
    await picture.evaluate((one) => one.scrollIntoView({ block: "center" }));         // not under the values
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
  await sleep(1000);
  await shot("app_phone");
  await browser.close();
  found.wrong = found.console.length + found.requests.length + found.axe.filter((one) => SERIOUS.includes(one.impact)).length;
  console.log(JSON.stringify(found));
  process.exit(found.wrong ? 1 : 0);
})();
