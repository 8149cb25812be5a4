// The headless Chromium of the npm package @sparticuz/chromium, for machines that have none of their own.
import { execFileSync } from "node:child_process";
import { chmod, mkdir, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import path from "node:path";
import { brotliDecompressSync } from "node:zlib";

/** Unpack it once below the folder `modules`; what playwright needs to launch it, with the libraries it came with. */
export async function bundled(modules) {
  const packed = path.join(modules, "@sparticuz", "chromium", "bin");
  const folder = path.join(modules, ".chromium");
  if (!(await stat(folder).catch(() => null))) {
    const draft = `${folder}.${process.pid}`;
    await mkdir(draft, { recursive: true });
    await writeFile(path.join(draft, "chromium"), await unpacked(packed, "chromium.br"));
    await chmod(path.join(draft, "chromium"), 0o755);
    await writeFile(path.join(draft, "libraries.tar"), await unpacked(packed, "al2023.tar.br"));
    execFileSync("tar", ["-xf", "libraries.tar"], { cwd: draft });
    await rename(draft, folder).catch(() => rm(draft, { recursive: true })); // another process was faster
  }
  const libraries = [process.env.LD_LIBRARY_PATH, path.join(folder, "lib")].filter(Boolean).join(":");
  return { executablePath: path.join(folder, "chromium"), env: { ...process.env, LD_LIBRARY_PATH: libraries } };
}

const unpacked = async (folder, name) => brotliDecompressSync(await readFile(path.join(folder, name)));
