// Memory that `enqueue` reads and writes: of the GPU, or of this process for a library that runs on a CPU.
//
// The emulated library watches what its kernels touch; it exports the functions that say what they may.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef MBQ_HOST_CUDA
#include <cuda_runtime_api.h>
#endif

constexpr uint8_t kUntouched = 0xA5;

// Where the plugins compute.
enum class Place {
    kNowhere,   // a CUDA library on a machine without a driver: every launch returns 35
    kEmulator,  // on this CPU
    kGpu,
};

struct Emulator {
    int (*allow)(const void *, size_t, int) = nullptr;
    void (*forget_all)() = nullptr;
    const char *(*message)() = nullptr;

    explicit Emulator(void *library) {
        allow = reinterpret_cast<decltype(allow)>(dlsym(library, "mbq_emulation_register"));
        forget_all = reinterpret_cast<decltype(forget_all)>(dlsym(library, "mbq_emulation_forget_all"));
        message = reinterpret_cast<decltype(message)>(dlsym(library, "mbq_emulation_message"));
    }
};

inline void check_cuda(int status, const char *what) {
    if (status == 0) return;
    std::printf("FAILED %s: CUDA error %d\n", what, status);
    std::exit(1);
}

// Zeroed by nobody: filled with kUntouched.
class Buffer {
   public:
    Buffer(Place place, size_t bytes) : place_(place), bytes_(bytes) {
        if (place == Place::kGpu) {
#ifdef MBQ_HOST_CUDA
            check_cuda(cudaMalloc(&address_, bytes + 1), "cudaMalloc");
            check_cuda(cudaMemset(address_, kUntouched, bytes + 1), "cudaMemset");
#endif
        } else {
            address_ = std::aligned_alloc(256, (bytes + 256) / 256 * 256);
            std::memset(address_, kUntouched, bytes);
        }
    }
    Buffer(Place place, const std::vector<uint8_t> &content) : Buffer(place, content.size()) { write(content); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    Buffer(Buffer &&other) noexcept : place_(other.place_), bytes_(other.bytes_), address_(other.address_) {
        other.address_ = nullptr;
    }
    ~Buffer() {
#ifdef MBQ_HOST_CUDA
        if (place_ == Place::kGpu) cudaFree(address_);
#endif
        if (place_ != Place::kGpu) std::free(address_);
    }

    void write(const std::vector<uint8_t> &content) {
#ifdef MBQ_HOST_CUDA
        if (place_ == Place::kGpu)
            check_cuda(cudaMemcpy(address_, content.data(), content.size(), cudaMemcpyHostToDevice), "upload");
#endif
        if (place_ != Place::kGpu) std::memcpy(address_, content.data(), content.size());
    }

    // Waits for everything that runs.
    std::vector<uint8_t> read() const {
        std::vector<uint8_t> content(bytes_);
#ifdef MBQ_HOST_CUDA
        if (place_ == Place::kGpu) {
            check_cuda(cudaDeviceSynchronize(), "kernel");
            check_cuda(cudaMemcpy(content.data(), address_, bytes_, cudaMemcpyDeviceToHost), "download");
        }
#endif
        if (place_ != Place::kGpu) std::memcpy(content.data(), address_, bytes_);
        return content;
    }

    bool untouched() const {
        for (const uint8_t byte : read())
            if (byte != kUntouched) return false;
        return true;
    }

    void allow(const Emulator &emulator, bool writable) const {
        if (emulator.allow != nullptr && bytes_ > 0) check_cuda(emulator.allow(address_, bytes_, writable), "emulator");
    }

    void *address() const { return address_; }

   private:
    Place place_;
    size_t bytes_;
    void *address_ = nullptr;
};
