/* Writes records in lock step over several disks: record n goes to the first file and is synced, then to the second, and so on; then
 * n + 1. So a snapshot of one instant holds n_1 >= n_2 >= ... >= n_1 - 1, and one taken while the writer is held between two rounds
 * holds the same number everywhere. A record is 64 bytes of text. A file is a ring of SLOTS records: record n lies in slot
 * (n - 1) % SLOTS, so the disks do not fill.
 *
 * usage: writer MICROSECONDS_BETWEEN_ROUNDS FILE...
 * While /run/writer.hold is there it is held between two rounds; /run/writer.held says that it is. No signals: two that are pending
 * at once are handled in the wrong order, and a writer that waits for its disk gets them so.
 * /run/writer.count is the number of the last record that all disks hold. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { RECORD = 64, SLOTS = 131072, MOST = 16 };
static const char *const HOLD = "/run/writer.hold", *const HELD = "/run/writer.held", *const COUNT = "/run/writer.count";

static int put(int fd, unsigned long n, int disk, const char *word) {
  char line[RECORD + 64];
  snprintf(line, sizeof line, "%-16lu %2d %-43s", n, disk, word);
  line[RECORD - 1] = '\n';
  if (pwrite(fd, line, RECORD, (off_t)((n - 1) % SLOTS) * RECORD) != RECORD) return -1;
  return fdatasync(fd);
}

/* The number of the last record in a file. */
static unsigned long last(int fd) {
  char line[RECORD + 1] = {0};
  unsigned long most = 0;
  for (off_t at = 0; pread(fd, line, RECORD, at) == RECORD; at += RECORD) {
    unsigned long n = strtoul(line, NULL, 10);
    if (n > most) most = n;
  }
  return most;
}

static void hold(void) {
  while (access(HOLD, F_OK) == 0) {
    close(open(HELD, O_CREAT | O_WRONLY, 0644)); /* again: who holds it takes away what an earlier one left */
    usleep(2000);
  }
  unlink(HELD);
}

int main(int count, char **words) {
  int files = count - 2, fds[MOST];
  unsigned long have[MOST], n = 0;
  if (files < 1 || files > MOST) return 1;
  int pause_us = atoi(words[1]);
  for (int i = 0; i < files; i++) {
    fds[i] = open(words[i + 2], O_RDWR | O_CREAT, 0644);
    if (fds[i] < 0) { perror(words[i + 2]); return 1; }
    have[i] = last(fds[i]);
    if (have[i] > n) n = have[i];
  }
  for (int i = 0; i < files; i++) { /* after a restore: bring the disks that lag up to the others */
    unsigned long from = have[i] + SLOTS > n ? have[i] : n - SLOTS;
    for (unsigned long k = from + 1; k <= n; k++)
      if (put(fds[i], k, i, "caught up")) { perror("write"); return 2; }
  }
  int counter = open(COUNT, O_CREAT | O_WRONLY, 0644);
  for (;;) {
    if (access(HOLD, F_OK) == 0) hold();
    n++;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    char text[48];
    snprintf(text, sizeof text, "%ld.%09ld", (long)now.tv_sec, now.tv_nsec);
    for (int i = 0; i < files; i++)
      if (put(fds[i], n, i, text)) { perror("write"); return 3; }
    int length = snprintf(text, sizeof text, "%lu\n", n);
    if (pwrite(counter, text, length, 0) != length) return 4;
    if (pause_us) usleep(pause_us);
  }
}
