/* A libnvidia-ml.so.1 that says what a file tells it to, so that the real pynvml and our own gatherer run through.
 *
 * FAKE_NVML names the file. A line is `key value`, or `3.key value` for GPU 3 alone; the card's line wins. A key that
 * is a function's name makes that function return the number (NVML's code), or hang with the value `hang`. Without a
 * line a card is a healthy H100. Built with -DOLD the calls that drivers before 510 lack are not there at all.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int ret;
typedef unsigned int u32;
typedef unsigned long long u64;
enum { OK = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7 };

/* A handle: the card's number, and the slice's where it is a MIG device. */
typedef struct { int card, slice; } device;
static device cards[64];

static int lookup(const char *key, char *value, size_t room) {
    char line[512], name[128];
    int found = 0, at = 0;
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return 0;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "%127s %n", name, &at) == 1 && !strcmp(name, key)) {
            line[strcspn(line, "\n")] = 0;
            snprintf(value, room, "%s", line + at);
            found = 1;
        }
    fclose(file);
    return found;
}

static int told(int card, const char *key, char *value, size_t room) {
    char own[160];
    snprintf(own, sizeof own, "%d.%s", card, key);
    return lookup(own, value, room) || lookup(key, value, room);
}

static u64 number(int card, const char *key, u64 other) {
    char value[256];
    return told(card, key, value, sizeof value) ? strtoull(value, NULL, 0) : other;
}

static void words(int card, const char *key, const char *other, char *out, size_t room) {
    if (!told(card, key, out, room)) snprintf(out, room, "%s", other);
}

static ret fails(int card, const char *function) {
    char value[256];
    if (!told(card, function, value, sizeof value)) return OK;
    while (!strcmp(value, "hang")) sleep(60);
    return atoi(value);
}

#define TRY(card) do { ret code = fails(card, __func__); if (code) return code; } while (0)
#define GET(name, type, key, other) \
    ret name(device *d, type *out) { TRY(d->card); *out = (type)number(d->card, key, other); return OK; }

ret nvmlInitWithFlags(u32 flags) { (void)flags; TRY(-1); return OK; }
ret nvmlShutdown(void) { return OK; }

const char *nvmlErrorString(ret code) {
    switch (code) {
    case 3: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case 9: return "Driver Not Loaded";
    case 13: return "Function Not Found";
    case 15: return "GPU is lost";
    case 16: return "GPU requires reset";
    case 18: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

ret nvmlSystemGetDriverVersion(char *out, u32 room) { TRY(-1); words(-1, "driver", "580.159.04", out, room); return OK; }
ret nvmlSystemGetCudaDriverVersion_v2(int *out) { TRY(-1); *out = (int)number(-1, "cuda", 13000); return OK; }
ret nvmlDeviceGetCount_v2(u32 *out) { TRY(-1); *out = (u32)number(-1, "count", 1); return OK; }

ret nvmlDeviceGetHandleByIndex_v2(u32 index, device **out) {
    TRY((int)index);
    cards[index] = (device){(int)index, -1};
    *out = &cards[index];
    return OK;
}

ret nvmlDeviceGetName(device *d, char *out, u32 room) {
    TRY(d->card);
    words(d->card, d->slice < 0 ? "name" : "slice_name", "NVIDIA H100 80GB HBM3", out, room);
    return OK;
}

ret nvmlDeviceGetUUID(device *d, char *out, u32 room) {
    TRY(d->card);
    if (d->slice < 0) snprintf(out, room, "GPU-%08d-0000-0000-0000-000000000000", d->card);
    else snprintf(out, room, "MIG-%08d-0000-0000-0000-%012d", d->card, d->slice);
    return OK;
}

typedef struct { char legacy[16]; u32 domain, bus, device, id, subsystem; char bus_id[32]; } pci;
ret nvmlDeviceGetPciInfo_v3(device *d, pci *out) {
    TRY(d->card);
    memset(out, 0, sizeof *out);
    snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", d->card + 16);
    return OK;
}

typedef struct { u64 total, free, used; } memory;
ret nvmlDeviceGetMemoryInfo(device *d, memory *out) {
    TRY(d->card);
    out->total = number(d->card, d->slice < 0 ? "memory" : "slice_memory", 85520809984ull);
    out->used = number(d->card, d->slice < 0 ? "used" : "slice_used", 503316480ull);
    out->free = out->total - out->used;
    return OK;
}

ret nvmlDeviceGetCudaComputeCapability(device *d, int *major, int *minor) {
    u64 both = number(d->card, "capability", 90);
    TRY(d->card);
    *major = (int)(both / 10);
    *minor = (int)(both % 10);
    return OK;
}

typedef struct { u32 pid; u64 used; u32 instance, compute; } process;
static ret running(device *d, u32 *count, process *out) {
    u32 there = number(d->card, "pid", 0) ? 1 : 0;
    if (there && (*count < there || !out)) { *count = there; return TOO_SMALL; }
    if (there) out[0] = (process){(u32)number(d->card, "pid", 0), number(d->card, "pid_used", 1ull << 30), 0, 0};
    *count = there;
    return OK;
}
ret nvmlDeviceGetComputeRunningProcesses_v2(device *d, u32 *count, process *out) { TRY(d->card); return running(d, count, out); }

GET(nvmlDeviceGetComputeMode, int, "compute_mode", 0)
GET(nvmlDeviceGetPersistenceMode, int, "persistence", 1)
GET(nvmlDeviceGetCurrPcieLinkWidth, u32, "pcie", 16)
GET(nvmlDeviceGetMaxPcieLinkWidth, u32, "pcie_max", 16)
GET(nvmlDeviceGetCurrentClocksThrottleReasons, u64, "clocks", 1)

ret nvmlDeviceGetTemperature(device *d, int sensor, u32 *out) {
    (void)sensor;
    TRY(d->card);
    *out = (u32)number(d->card, "temperature", 32);
    return OK;
}

ret nvmlDeviceGetEccMode(device *d, int *now, int *pending) {
    TRY(d->card);
    *now = (int)number(d->card, "ecc", 1);
    *pending = (int)number(d->card, "ecc_pending", 1);
    return OK;
}

ret nvmlDeviceGetTotalEccErrors(device *d, int kind, int counter, u64 *out) {
    TRY(d->card);
    *out = kind == 1 && counter == 0 ? number(d->card, "ecc_errors", 0) : 99;
    return OK;
}

ret nvmlDeviceGetRetiredPagesPendingStatus(device *d, int *out) {
    TRY(d->card);
    *out = (int)number(d->card, "retire", 0);
    return number(d->card, "retire", 99) == 99 ? NOT_SUPPORTED : OK;
}

ret nvmlDeviceGetNvLinkState(device *d, u32 link, int *out) {
    TRY(d->card);
    *out = link < number(d->card, "links_up", 18);
    return link < number(d->card, "links", 18) ? OK : 2;
}

/* `links.1 4`: four of the card's links lead to card 1, counted from link 0 on; without such lines all lead to switches. */
ret nvmlDeviceGetNvLinkRemoteDeviceType(device *d, u32 link, int *out) {
    (void)link;
    TRY(d->card);
    *out = (int)number(d->card, "link_kind", 2);
    return OK;
}

ret nvmlDeviceGetNvLinkRemotePciInfo_v2(device *d, u32 link, pci *out) {
    char key[32];
    TRY(d->card);
    for (u32 card = 0, before = 0; card < 64; card++) {
        snprintf(key, sizeof key, "links.%u", card);
        before += (u32)number(d->card, key, 0);
        if (link < before) return nvmlDeviceGetPciInfo_v3(&cards[card], out);
    }
    return NOT_FOUND;
}

/* `0.level.2 50`: the level between cards 0 and 2, the lower number first. */
ret nvmlDeviceGetTopologyCommonAncestor(device *one, device *other, int *out) {
    char key[32];
    int first = one->card < other->card ? one->card : other->card, second = one->card + other->card - first;
    TRY(first);
    snprintf(key, sizeof key, "level.%d", second);
    *out = (int)number(first, key, number(first, "level", 40));
    return OK;
}

static ret mask(device *d, u32 words, u64 *out, const char *key, u64 other) {
    memset(out, 0, words * sizeof *out);
    out[0] = number(d->card, key, other);
    return OK;
}
ret nvmlDeviceGetCpuAffinity(device *d, u32 words, u64 *out) { TRY(d->card); return mask(d, words, out, "cpus", 0xff); }

typedef struct { u32 field, scope; long long time, latency; int type; ret code; u64 value; } field;
ret nvmlDeviceGetFieldValues(device *d, int count, field *values) {
    TRY(d->card);
    for (int i = 0; i < count; i++) {
        u64 action = number(d->card, "recovery", 0);
        values[i].code = values[i].field == 230 && action != 99 ? OK : NOT_SUPPORTED;
        values[i].value = action;
    }
    return OK;
}

#ifndef OLD
ret nvmlDeviceGetComputeRunningProcesses_v3(device *d, u32 *count, process *out) { TRY(d->card); return running(d, count, out); }
GET(nvmlDeviceGetCurrentClocksEventReasons, u64, "clocks", 1)

ret nvmlDeviceGetRemappedRows(device *d, u32 *corrected, u32 *uncorrected, u32 *pending, u32 *failed) {
    TRY(d->card);
    *corrected = *uncorrected = 0;
    *pending = (u32)number(d->card, "remap_pending", 0);
    *failed = (u32)number(d->card, "remap_failed", 0);
    return OK;
}

typedef struct { u32 version; unsigned char cluster[16]; ret status; u32 clique; unsigned char state; u32 mask; } fabric;
ret nvmlDeviceGetGpuFabricInfoV(device *d, fabric *out) {
    TRY(d->card);
    out->state = (unsigned char)number(d->card, "fabric", 3);
    out->status = (ret)number(d->card, "fabric_status", 0);
    return OK;
}

ret nvmlDeviceGetMigMode(device *d, u32 *now, u32 *pending) {
    TRY(d->card);
    *now = *pending = number(d->card, "mig", 0) ? 1 : 0;
    return OK;
}

ret nvmlDeviceGetMaxMigDeviceCount(device *d, u32 *out) { TRY(d->card); *out = 7; return OK; }

ret nvmlDeviceGetMemoryAffinity(device *d, u32 words, u64 *out, u32 scope) {
    (void)scope;
    TRY(d->card);
    return mask(d, words, out, "numa", 1);
}

static device slices[64][8];

/* The value of `mig` is the number of slices; number 1 is left free, as after a slice was destroyed. */
ret nvmlDeviceGetMigDeviceHandleByIndex(device *d, u32 index, device **out) {
    TRY(d->card);
    if (index == 1 || index > number(d->card, "mig", 0)) return NOT_FOUND;
    slices[d->card][index] = (device){d->card, (int)index};
    *out = &slices[d->card][index];
    return OK;
}
#endif
