// A problem with numbers, written by tests/plugins/make_cases.py: lines of text, then the inputs' bytes.
//
//   mbq-case 1
//   op W3Linear
//   field N 48
//   input half 3 1 3 256         type, rank, sizes; in the order of the graph
//   output half 3 1 3 48
//   data
#pragma once

#include <fstream>
#include <sstream>

#include "linear.h"

inline Tensor read_tensor(std::istringstream &words) {
    std::string type;
    Tensor tensor;
    words >> type >> tensor.dims.nbDims;
    for (int i = 0; i < tensor.dims.nbDims; ++i) words >> tensor.dims.d[i];
    tensor.type = type == "half"       ? DataType::kHALF
                  : type == "bfloat16" ? DataType::kBF16
                  : type == "float"    ? DataType::kFLOAT
                                       : DataType::kINT32;
    return tensor;
}

inline Linear read_case(const char *path) {
    std::ifstream file(path, std::ios::binary);
    Linear linear;
    for (std::string line; std::getline(file, line) && line != "data";) {
        std::istringstream words(line);
        std::string key, name;
        words >> key;
        if (key == "op") words >> linear.op;
        if (key == "field") {
            words >> name;
            words >> linear.fields[name];
        }
        if (key == "input") linear.inputs.push_back(read_tensor(words));
        if (key == "output") linear.output = read_tensor(words);
    }
    for (const Tensor &each : linear.inputs) {
        std::vector<uint8_t> content(each.bytes());
        file.read(reinterpret_cast<char *>(content.data()), static_cast<std::streamsize>(content.size()));
        linear.contents.push_back(content);
    }
    if (!file || linear.inputs.empty()) {
        std::printf("FAILED %s is no whole case\n", path);
        std::exit(1);
    }
    return linear;
}

inline void write_bytes(const char *path, const std::vector<uint8_t> &bytes) {
    std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char *>(bytes.data()),
                                                static_cast<std::streamsize>(bytes.size()));
}
