/* A stand-in for libnvidia-ml.so.1: the environment says what it answers.
 *
 * NVML_STUB       Cards, apart by ';'. Slices of a card follow it, each after a '>'. Both are
 *                 uuid,name,total,used[,reserved[,pid:bytes|pid:bytes...]]
 * NVML_STUB_FAIL  function=code,...  These functions answer with these codes.
 * NVML_STUB_GROW  Bytes by which the used bytes grow from one reading to the next.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, UNINITIALIZED = 1, BAD_ARGUMENT = 2, NOT_FOUND = 6, TOO_SMALL = 7 };
enum { MOST_CARDS = 16, MOST_SLICES = 7, MOST_PROCESSES = 8, TEXT = 96, VERSION_MISMATCH = 25 };

typedef unsigned long long u64;
typedef struct { unsigned pid; u64 bytes; unsigned gpu_instance, compute_instance; } Process;
typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned version; u64 total, reserved, free, used; } Memory2;
typedef struct Gpu {
    char uuid[TEXT], name[TEXT];
    u64 total, used, reserved;
    unsigned process_count, slice_count;
    Process processes[MOST_PROCESSES];
    struct Gpu *slices;
} Gpu;

static Gpu cards[MOST_CARDS], slices[MOST_CARDS][MOST_SLICES];
static unsigned card_count, opened;
static u64 readings;

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

static int code_for(const char *function) {
    size_t length = strlen(function);
    for (const char *at = setting("NVML_STUB_FAIL"); at && *at; at = strchr(at, ',')) {
        at += *at == ',';
        if (!strncmp(at, function, length) && at[length] == '=') return atoi(at + length + 1);
    }
    return OK;
}

#define ANSWER_OR_FAIL                                   \
    do {                                                 \
        int code = code_for(__func__);                   \
        if (code == OK && !opened) code = UNINITIALIZED; \
        if (code != OK) return code;                     \
    } while (0)

static void read_gpu(Gpu *gpu, const char *text) {
    char list[256] = "", *rest;
    memset(gpu, 0, sizeof *gpu);
    sscanf(text, "%95[^,],%95[^,],%llu,%llu,%llu,%255s", gpu->uuid, gpu->name, &gpu->total,
           &gpu->used, &gpu->reserved, list);
    for (char *at = strtok_r(list, "|", &rest); at; at = strtok_r(NULL, "|", &rest)) {
        if (gpu->process_count == MOST_PROCESSES) break;
        Process *process = &gpu->processes[gpu->process_count++];
        process->gpu_instance = process->compute_instance = 0xFFFFFFFF;
        sscanf(at, "%u:%llu", &process->pid, &process->bytes);
    }
}

static void read_cards(void) {
    char *text = strdup(setting("NVML_STUB")), *rest, *inner;
    card_count = 0;
    for (char *card = strtok_r(text, ";", &rest); card; card = strtok_r(NULL, ";", &rest)) {
        if (card_count == MOST_CARDS) break;
        Gpu *gpu = &cards[card_count];
        char *part = strtok_r(card, ">", &inner);
        read_gpu(gpu, part);
        gpu->slices = slices[card_count++];
        while ((part = strtok_r(NULL, ">", &inner)) && gpu->slice_count < MOST_SLICES)
            read_gpu(&gpu->slices[gpu->slice_count++], part);
    }
    free(text);
}

static int put(char *to, unsigned room, const char *from) {
    if (strlen(from) >= room) return TOO_SMALL;
    strcpy(to, from);
    return OK;
}

static u64 used_now(const Gpu *gpu) {
    return gpu->used + strtoull(setting("NVML_STUB_GROW"), NULL, 10) * readings++;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int code = code_for(__func__);
    if (code != OK) return code;
    opened++;
    read_cards();
    return OK;
}

int nvmlShutdown(void) {
    ANSWER_OR_FAIL;
    opened--;
    return OK;
}

const char *nvmlErrorString(int code) { return code == OK ? "Success" : "an error of the stub"; }

int nvmlSystemGetDriverVersion(char *to, unsigned room) {
    ANSWER_OR_FAIL;
    return put(to, room, "555.42.02");
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    ANSWER_OR_FAIL;
    *count = card_count;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu **gpu) {
    ANSWER_OR_FAIL;
    if (index >= card_count) return BAD_ARGUMENT;
    *gpu = &cards[index];
    return OK;
}

int nvmlDeviceGetUUID(const Gpu *gpu, char *to, unsigned room) {
    ANSWER_OR_FAIL;
    return put(to, room, gpu->uuid);
}

int nvmlDeviceGetName(const Gpu *gpu, char *to, unsigned room) {
    ANSWER_OR_FAIL;
    return put(to, room, gpu->name);
}

int nvmlDeviceGetMigMode(const Gpu *gpu, unsigned *now, unsigned *pending) {
    ANSWER_OR_FAIL;
    *now = *pending = gpu->slice_count > 0 || !strncmp(gpu->uuid, "MIG-", 4);
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(const Gpu *gpu, unsigned *most) {
    ANSWER_OR_FAIL;
    *most = gpu->slice_count ? MOST_SLICES : 0;
    return OK;
}

int nvmlDeviceGetMigDeviceHandleByIndex(const Gpu *gpu, unsigned place, Gpu **slice) {
    ANSWER_OR_FAIL;
    if (place >= gpu->slice_count) return NOT_FOUND;
    *slice = &gpu->slices[place];
    return OK;
}

int nvmlDeviceGetMemoryInfo(const Gpu *gpu, Memory *memory) {
    ANSWER_OR_FAIL;
    memory->total = gpu->total;
    memory->used = used_now(gpu) + gpu->reserved; /* Version 1 does not tell them apart. */
    memory->free = gpu->total - memory->used;
    return OK;
}

int nvmlDeviceGetMemoryInfo_v2(const Gpu *gpu, Memory2 *memory) {
    ANSWER_OR_FAIL;
    if (memory->version != (sizeof(Memory2) | 2u << 24)) return VERSION_MISMATCH;
    memory->total = gpu->total;
    memory->used = used_now(gpu);
    memory->reserved = gpu->reserved;
    memory->free = gpu->total - memory->used - gpu->reserved;
    return OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(const Gpu *gpu, unsigned *count, Process *to) {
    ANSWER_OR_FAIL;
    unsigned room = *count;
    *count = gpu->process_count;
    if (room < gpu->process_count) return TOO_SMALL;
    if (to) memcpy(to, gpu->processes, gpu->process_count * sizeof *to);
    return OK;
}
