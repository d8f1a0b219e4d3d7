/* Writes records in lock step over several disks: record n goes to the first file and is synced, then to the second, and so
 * on; then n + 1. So a snapshot of one instant holds n_1 >= n_2 >= ... >= n_1 - 1, and one taken while the writer is held
 * between two rounds holds the same number everywhere. A record is 64 bytes of text.
 *
 * usage: writer MICROSECONDS_BETWEEN_ROUNDS FILE...     SIGUSR1 holds it between two rounds, SIGUSR2 lets it go on. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { RECORD = 64, MOST = 16 };
static volatile sig_atomic_t held = 0;

static void on_signal(int number) { held = (number == SIGUSR1); }

static int append(int fd, unsigned long n, int disk, const char *word) {
  char line[RECORD + 16];
  snprintf(line, sizeof line, "%-16lu %d %-44s", n, disk, word);
  line[RECORD - 1] = '\n';
  if (write(fd, line, RECORD) != RECORD) return -1;
  return fdatasync(fd);
}

int main(int count, char **words) {
  int files = count - 2, fds[MOST];
  unsigned long n = 0;
  if (files < 1 || files > MOST) return 1;
  int pause_us = atoi(words[1]);
  signal(SIGUSR1, on_signal);
  signal(SIGUSR2, on_signal);
  for (int i = 0; i < files; i++) {
    fds[i] = open(words[i + 2], O_RDWR | O_CREAT | O_APPEND, 0644);
    if (fds[i] < 0) { perror(words[i + 2]); return 1; }
    unsigned long have = lseek(fds[i], 0, SEEK_END) / RECORD;
    if (have > n) n = have;
  }
  for (int i = 0; i < files; i++) { /* after a restore: bring the disks that lag up to the others */
    for (unsigned long k = lseek(fds[i], 0, SEEK_END) / RECORD; k < n; k++)
      if (append(fds[i], k + 1, i, "caught up")) return 2;
  }
  for (;;) {
    while (held) usleep(1000);
    n++;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    char stamp[48];
    snprintf(stamp, sizeof stamp, "%ld.%09ld", (long)now.tv_sec, now.tv_nsec);
    for (int i = 0; i < files; i++)
      if (append(fds[i], n, i, stamp)) { perror("write"); return 3; }
    if (pause_us) usleep(pause_us);
  }
}
