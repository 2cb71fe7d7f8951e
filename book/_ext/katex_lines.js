// One request a line on standard input, one reply a line on standard output; the argument is the path of KaTeX.
const katex = require(process.argv[2]);
require("readline")
  .createInterface({ input: process.stdin })
  .on("line", (line) => {
    const { latex, options } = JSON.parse(line);
    let reply;
    try {
      reply = { html: katex.renderToString(latex, options) };
    } catch (error) {
      reply = { error: error.message };
    }
    process.stdout.write(JSON.stringify(reply) + "\n");
  });
