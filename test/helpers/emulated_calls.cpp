// Calls kernels that are linked to this program, in a process that emulates another processor, with the memory of the
// process whose id is the first argument.
//
// A kernel gets addresses of that process. A page that it touches is not there, which is a fault: then the page is
// fetched, to the same address. After the call every byte that changed is written back, and all pages are dropped.
//
// Requests on standard input, a line each: the function's name and its arguments, "i" and an integer or "f" and the bits
// of a float32. The answer is a line with the integer that it returned. Calls follow AArch64's procedure call standard:
// eight integers and eight floats in registers, further arguments in slots of eight bytes on the stack.
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace {

constexpr size_t PAGE = 4096;
constexpr int MOST_ON_STACK = 24;

int parent_memory;
std::atomic_flag fetching = ATOMIC_FLAG_INIT;
std::map<char*, std::vector<char>> pages;  // by address, as they were fetched

[[noreturn]] void fail(const char* what, const void* address) {
    std::fprintf(stderr, "%s at %p\n", what, address);
    _exit(2);
}

// Fills a page elsewhere before it is put in its place: another thread must not read it half done.
void fetch(char* page) {
    void* place = mmap(page, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (place != page) fail("the emulator itself uses this address, or the access is wrong", page);
    char* filled = static_cast<char*>(mmap(nullptr, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (pread(parent_memory, filled, PAGE, off_t(page)) != ssize_t(PAGE)) fail("a kernel touches no memory", page);
    pages[page].assign(filled, filled + PAGE);
    if (mremap(filled, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, page) != page) fail("cannot place a page", page);
}

void on_fault(int, siginfo_t* fault, void*) {
    char* page = reinterpret_cast<char*>(uintptr_t(fault->si_addr) / PAGE * PAGE);
    while (fetching.test_and_set()) usleep(10);
    if (!pages.count(page)) fetch(page);
    fetching.clear();
}

void give_back() {
    for (auto& [page, before] : pages) {
        for (size_t i = 0; i < PAGE;) {
            size_t end = i;
            while (end < PAGE && page[end] != before[end]) end++;
            if (end > i && pwrite(parent_memory, page + i, end - i, off_t(page + i)) != ssize_t(end - i))
                fail("cannot write", page + i);
            i = end + 1;
        }
        munmap(page, PAGE);
    }
    pages.clear();
}

double in_register(uint64_t bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <size_t... I>
int64_t call(void* function, const int64_t* x, const double* d, const int64_t* stack, std::index_sequence<I...>) {
    using Function = int64_t (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, double,
                                 double, double, double, double, double, double, decltype(int64_t(I))...);
    return reinterpret_cast<Function>(function)(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], d[0], d[1], d[2], d[3],
                                                d[4], d[5], d[6], d[7], stack[I]...);
}

int64_t answer(const std::string& request) {
    std::istringstream words(request);
    std::string name, kind;
    words >> name;
    void* function = dlsym(RTLD_DEFAULT, name.c_str());
    if (!function) fail(name.c_str(), nullptr);
    int64_t x[8] = {}, stack[MOST_ON_STACK] = {};
    double d[8] = {};
    int integers = 0, floats = 0, on_stack = 0;
    for (uint64_t value; words >> kind >> value;) {
        if (kind == "i" && integers < 8)
            x[integers++] = int64_t(value);
        else if (kind == "f" && floats < 8)
            d[floats++] = in_register(value);
        else if (on_stack < MOST_ON_STACK)
            stack[on_stack++] = int64_t(value);
        else
            fail("too many arguments", nullptr);
    }
    return call(function, x, d, stack, std::make_index_sequence<MOST_ON_STACK>{});
}

}  // namespace

int main(int, char** arguments) {
    parent_memory = open(("/proc/" + std::string(arguments[1]) + "/mem").c_str(), O_RDWR);
    if (parent_memory < 0) fail("cannot open the memory of the parent", nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, nullptr);
    for (std::string request; std::getline(std::cin, request);) {
        int64_t result = answer(request);
        give_back();
        std::cout << result << std::endl;
    }
}
