// Opens pages in headless Chromium as a reader would and says what is wrong with them.
//
//     npm install puppeteer-core axe-core && apt install chromium
//     NODE_PATH=node_modules node scripts/check_page.js report.html [--screenshots DIR]
//
// Per page: milliseconds until it is loaded, bytes, messages of the console, requests that leave the file, findings of
// axe-core (light and dark, wide and narrow), whether a phone's width makes the whole page scroll sideways, how many
// elements the tab key reaches, and how many keys to colours there are, and entries of them that are not printed. One line of JSON each; the exit status is 1 if anything is wrong.
const fs = require("fs");
const path = require("path");
const puppeteer = require("puppeteer-core");
const axe = require("axe-core");

const VIEWS = [["light", 1280, 900], ["dark", 1280, 900], ["light", 375, 740], ["dark", 375, 740]];
const SERIOUS = ["serious", "critical"];

async function check(browser, file, folder) {
  const found = { page: path.basename(file), bytes: fs.statSync(file).size, console: [], requests: [], axe: [], wide: [] };
  for (const [scheme, width, height] of VIEWS) {
    const page = await browser.newPage();
    await page.setBypassCSP(true);
    await page.setViewport({ width, height });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    page.on("console", (message) => found.console.push(message.text()));
    page.on("pageerror", (error) => found.console.push(String(error)));
    page.on("request", (request) => {
      if (!/^(file|data):/.test(request.url())) found.requests.push(request.url());
    });
    const start = Date.now();
    await page.goto("file://" + path.resolve(file), { waitUntil: "load", timeout: 120000 });
    found.ms = Math.max(found.ms || 0, Date.now() - start);
    if (folder) {
      await page.screenshot({ path: path.join(folder, `${path.parse(file).name}_${scheme}_${width}.png`), fullPage: true });
    }
    await page.evaluate(axe.source);
    const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"], preload: false }));
    for (const { id, impact, nodes } of violations) {
      found.axe.push({ id, impact, scheme, width, nodes: nodes.length, first: nodes[0].html.slice(0, 200) });
    }
    const scrolled = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    if (scrolled > 0) found.wide.push({ width, scrolled });
    found.tab_stops = await page.evaluate(() => document.querySelectorAll("a[href], summary, [tabindex='0']").length);
    await page.emulateMediaType("print");
    found.keys = (await page.$$("ul.key")).length;
    found.unprinted = await page.$$eval("ul.key li", (entries) => entries.filter(
      (one) => !one.checkVisibility({ contentVisibilityAuto: true }) || !one.getBoundingClientRect().height).length);
    await page.close();
  }
  found.wrong = found.console.length + found.requests.length + found.wide.length + found.unprinted +
    found.axe.filter(({ impact }) => SERIOUS.includes(impact)).length;
  return found;
}

(async () => {
  const given = process.argv.slice(2);
  const at = given.indexOf("--screenshots");
  const [, folder] = at < 0 ? [] : given.splice(at, 2);
  const browser = await puppeteer.launch({
    executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu"] });
  let wrong = 0;
  for (const file of given) {
    const found = await check(browser, file, folder);
    wrong += found.wrong;
    console.log(JSON.stringify(found));
  }
  await browser.close();
  process.exitCode = wrong ? 1 : 0;
})();
