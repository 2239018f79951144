// llama.cpp, or a program descended from it, as a process that decode.py measures: serve_engine.py says how it
// is asked. Compiled against the llama.h of the sources that are measured.
//
//     with_llama serve MODEL.gguf THREADS [repack]
//     with_llama make SOURCE.gguf TARGET.gguf FTYPE      FTYPE: a number of llama.h's llama_ftype

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

using Clock = std::chrono::steady_clock;
using Tokens = std::vector<std::vector<llama_token>>;

static void silent(ggml_log_level level, const char *text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

static void require(bool holds, const char *what) {
    if (!holds) {
        std::fprintf(stderr, "%s\n", what);
        std::exit(1);
    }
}

// What the two programs name differently; the members of a template are looked up only where they exist.
template <class Settings> void use_flash_attention(Settings &settings) {
    if constexpr (requires { settings.flash_attn_type; })
        settings.flash_attn_type = decltype(settings.flash_attn_type)(1);
    else
        settings.flash_attn = true;
}

template <class Settings> void repack(Settings &settings, bool asked) {
    if constexpr (requires { settings.repack_tensors; }) {  // ik_llama.cpp's -rtr; llama.cpp does it by itself
        settings.repack_tensors = asked;
        settings.use_mmap = !asked;
    }
}

template <class Context> void forget(Context *context) {
    if constexpr (requires { llama_kv_cache_clear(context); })
        llama_kv_cache_clear(context);
    else
        llama_memory_clear(llama_get_memory(context), false);
}

template <class Settings> bool quantize(const char *from, const char *to, Settings settings, int ftype) {
    settings.ftype = llama_ftype(ftype);
    settings.allow_requantize = true;
    return llama_model_quantize(from, to, &settings) == 0;
}

struct Engine {
    llama_model *model;
    int threads;
    int vocabulary;
    llama_context *context = nullptr;
    volatile long most_probable = 0;  // looked up as when text is written
    llama_batch batch = llama_batch_init(2048, 0, 1);
    size_t sequences = 0, room = 0;

    void make_room(size_t wanted_sequences, size_t wanted_room) {
        if (context && sequences == wanted_sequences && room >= wanted_room) return forget(context);
        if (context) llama_free(context);
        sequences = wanted_sequences, room = (wanted_room + 255) / 256 * 256;
        llama_context_params settings = llama_context_default_params();
        settings.n_ctx = sequences * room;
        settings.n_seq_max = sequences;
        settings.n_batch = 2048;
        settings.n_ubatch = 512;
        settings.n_threads = settings.n_threads_batch = threads;
        use_flash_attention(settings);
        context = llama_init_from_model(model, settings);
        require(context, "no context for this model");
    }

    // Reads tokens [from, to) of every sequence, with logits after each last one.
    void read(const Tokens &tokens, size_t from, size_t to) {
        batch.n_tokens = 0;
        for (size_t sequence = 0; sequence < tokens.size(); ++sequence)
            for (size_t at = from; at < to; ++at) {
                int row = batch.n_tokens++;
                batch.token[row] = tokens[sequence][at];
                batch.pos[row] = at;
                batch.n_seq_id[row] = 1;
                batch.seq_id[row][0] = sequence;
                batch.logits[row] = at + 1 == to;
            }
        require(llama_decode(context, batch) == 0, "llama_decode failed");
        const float *logits = llama_get_logits(context);
        for (size_t sequence = 0; sequence < tokens.size(); ++sequence, logits += vocabulary)
            most_probable = std::max_element(logits, logits + vocabulary) - logits;
    }

    double run(const Tokens &tokens, size_t prompt, const std::string &kept) {
        size_t length = tokens[0].size();
        make_room(tokens.size(), length);
        std::FILE *file = kept.empty() ? nullptr : std::fopen(kept.c_str(), "wb");
        auto started = Clock::now();
        read(tokens, 0, prompt);
        if (prompt < length) started = Clock::now();
        for (size_t at = prompt; at < length; ++at) {
            read(tokens, at, at + 1);
            if (file) std::fwrite(llama_get_logits(context), sizeof(float), vocabulary, file);
        }
        double seconds = std::chrono::duration<double>(Clock::now() - started).count();
        if (file) std::fclose(file);
        return seconds;
    }
};

static int serve(int count, char **arguments) {
    llama_model_params settings = llama_model_default_params();
    repack(settings, count > 4 && !std::strcmp(arguments[4], "repack"));
    llama_model *model = llama_model_load_from_file(arguments[2], settings);
    require(model, "the model cannot be loaded");
    Engine engine{model, std::atoi(arguments[3]), llama_vocab_n_tokens(llama_model_get_vocab(model))};
    std::cout << std::endl;  // the version: only the sources' folder knows it
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        size_t prompt;
        std::string kept, sequence;
        words >> prompt >> kept;
        Tokens tokens;
        while (words >> sequence) {
            std::istringstream ids(sequence);
            tokens.emplace_back();
            for (std::string id; std::getline(ids, id, ',');) tokens.back().push_back(std::stoi(id));
        }
        std::cout << engine.run(tokens, prompt, kept == "-" ? "" : kept) << std::endl;
    }
    return 0;
}

int main(int count, char **arguments) {
    require(count > 3, "see the first lines of with_llama.cpp");
    llama_log_set(silent, nullptr);
    llama_backend_init();
    if (!std::strcmp(arguments[1], "make"))
        return !quantize(arguments[2], arguments[3], llama_model_quantize_default_params(), std::atoi(arguments[4]));
    return serve(count, arguments);
}
