// Prints llama.cpp's own token ids: stdin has lines `<parse_special 0|1> <text in hex>`, stdout the ids of each.
#include "llama-vocab.h"
#include "llama-model-loader.h"
#include "llama-arch.h"
#include "llama-impl.h"
#include <cstdio>
#include <iostream>
#include <string>

// For models in several files, which none here is; they would pull in the rest of the library.
int32_t llama_split_path(char *, size_t, const char *, int32_t, int32_t) { return 0; }
int32_t llama_split_prefix(char *, size_t, const char *, int32_t, int32_t) { return 0; }

int main(int argc, char ** argv) {
    if (argc < 2) return 2;
    std::vector<std::string> splits;
    llama_model_loader ml(nullptr, nullptr, nullptr, argv[1], splits, nullptr, LLAMA_LOAD_MODE_NONE, false, true, false, nullptr, nullptr);
    llama_vocab vocab;
    LLM_KV kv(ml.get_arch());
    vocab.load(ml, kv);
    std::string line;
    while (std::getline(std::cin, line)) {
        bool special = line[0] == '1';
        std::string text;
        for (size_t i = 2; i + 1 < line.size(); i += 2) text.push_back((char) std::stoi(line.substr(i, 2), nullptr, 16));
        auto ids = vocab.tokenize(text, false, special);
        for (size_t i = 0; i < ids.size(); i++) printf(i ? " %d" : "%d", ids[i]);
        printf("\n");
    }
}
