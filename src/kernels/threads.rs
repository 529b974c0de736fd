//! How do several threads share the work of one kernel?
//!
//! A job is a number of chunks. Each thread, the caller among them, takes the next chunk from a counter until none is left,
//! so that a thread which the system doesn't schedule costs its share of the speed and no more. A worker without work spins
//! for some tens of microseconds, since the next kernel of a step follows at once, and then parks.
//! Invariant: `run` returns when every chunk is done and no thread can touch the task any more. A worker that sleeps
//! delays nobody: only one that holds a chunk is waited for.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use super::SharedOut;

/// How often a worker looks for the next job before it parks, a pause between: some 30 microseconds.
const WORKER_SPINS: usize = 1500;
/// How often the caller looks whether the last chunks are done before it parks.
const CALLER_SPINS: usize = 4000;

/// How long a worker runs before it lets whoever waits for its core have it: less than a time slice, at whose end the
/// system would take the core in the midst of a chunk.
const TURN: Duration = Duration::from_micros(500);

/// Rows that a thread takes at a time: one sequence's decode is not worth waking anybody.
const ROWS_A_CHUNK: usize = 8;

/// A fixed set of threads, the caller's own among them.
pub struct Threads {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// Alone on its cache line (two, since processors fetch them in pairs).
#[repr(align(128))]
struct Alone<T>(T);

struct Shared {
    /// Which job it is, whether threads may enter it, and how many have: see `State`.
    state: Alone<AtomicU64>,
    /// The next chunk of the job.
    next: Alone<AtomicUsize>,
    /// Written by the caller while nobody is inside and nobody may enter.
    job: UnsafeCell<Job>,
    parked: Box<[AtomicBool]>,
    ends: AtomicBool,
    caller: Mutex<Option<Thread>>,
    caller_parked: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is the only field that isn't `Sync`. It is written when no worker is inside and none may enter, and read by
// those inside alone; entering and leaving are read-modify-writes of `state` that order the two.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointers of a job are used only while `run` keeps what they point at alive.
unsafe impl Send for Shared {}

/// A job as the workers see it: a closure without its type.
struct Job {
    call: unsafe fn(*const (), usize, usize),
    task: *const (),
    chunks: usize,
}

/// The bits of `Shared::state`: how many workers are inside (lowest 31), whether the job is open, and its number.
struct State;

impl State {
    const OPEN: u64 = 1 << 31;
    const INSIDE: u64 = Self::OPEN - 1;
    const NEXT_JOB: u64 = 1 << 32;

    fn job(state: u64) -> u64 {
        state / Self::NEXT_JOB
    }
}

impl Threads {
    /// Starts `threads - 1` workers; the caller of `run` is the other thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let workers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            state: Alone(AtomicU64::new(0)),
            next: Alone(AtomicUsize::new(0)),
            job: UnsafeCell::new(Job { call: |_, _, _| {}, task: std::ptr::null(), chunks: 0 }),
            parked: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            ends: AtomicBool::new(false),
            caller: Mutex::new(None),
            caller_parked: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let mut threads = Self { shared, workers: Vec::with_capacity(workers) };
        for worker in 0..workers {
            let shared = Arc::clone(&threads.shared);
            let thread = std::thread::Builder::new().name(format!("model-{}", worker + 1));
            threads.workers.push(thread.spawn(move || shared.work(worker))?);
        }
        Ok(threads)
    }

    /// How many threads work, the caller's among them.
    pub fn count(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(chunk)` once for every chunk in `0..chunks`, from all threads, in no order.
    pub fn run(&mut self, chunks: usize, task: impl Fn(usize) + Sync) {
        self.run_indexed(chunks, &|_, chunk| task(chunk));
    }

    /// As `run`; each thread has a scratch of its own. Panics if there are fewer than threads.
    pub fn run_with<S: Send>(&mut self, scratch: &mut [S], chunks: usize, task: impl Fn(&mut S, usize) + Sync) {
        /// The first of the scratches.
        struct First<S>(*mut S);
        // SAFETY: each thread reaches only the scratch of its own number, and `S` may be sent.
        unsafe impl<S: Send> Sync for First<S> {}
        impl<S> First<S> {
            fn at(&self, thread: usize) -> *mut S {
                self.0.wrapping_add(thread)
            }
        }
        assert!(scratch.len() >= self.count(), "{} scratches for {} threads", scratch.len(), self.count());
        let first = First(scratch.as_mut_ptr());
        self.run_indexed(chunks, &|thread, chunk| {
            // SAFETY: there is a scratch for every thread (above), borrowed until `run_indexed` returns, and a thread works
            // on one chunk at a time.
            let scratch = unsafe { &mut *first.at(thread) };
            task(scratch, chunk);
        });
    }

    /// Calls `task(row, values)` once for each row of `rows`, `[rows, width]`, from all threads.
    pub fn for_rows<T: Send>(&mut self, rows: &mut [T], width: usize, task: impl Fn(usize, &mut [T]) + Sync) {
        let count = rows.len() / width;
        assert_eq!(rows.len(), count * width, "a part of a row");
        let shared = SharedOut::new(rows);
        self.run(count.div_ceil(ROWS_A_CHUNK), |chunk| {
            for row in chunk * ROWS_A_CHUNK..count.min((chunk + 1) * ROWS_A_CHUNK) {
                // SAFETY: borrowed for the whole run, and each row is one chunk's.
                task(row, unsafe { shared.part(row * width, width) });
            }
        });
    }

    fn run_indexed<F: Fn(usize, usize) + Sync>(&mut self, chunks: usize, task: &F) {
        let helpers = self.workers.len().min(chunks.saturating_sub(1));
        if helpers == 0 {
            return (0..chunks).for_each(|chunk| task(0, chunk));
        }
        /// # Safety
        /// `task` points at an `F` that lives.
        unsafe fn call<F: Fn(usize, usize)>(task: *const (), thread: usize, chunk: usize) {
            // SAFETY: the caller's promise.
            let task = unsafe { &*task.cast::<F>() };
            task(thread, chunk);
        }
        let shared = &*self.shared;
        let job = Job { call: call::<F>, task: std::ptr::from_ref(task).cast(), chunks };
        // SAFETY: `&mut self` says that no other job runs, and the last one was left by all who were inside.
        unsafe { *shared.job.get() = job };
        shared.next.0.store(0, Ordering::Relaxed);
        let closed = shared.state.0.load(Ordering::Relaxed);
        // Sequentially consistent, as a worker's announcement that it parks: one of the two sees the other.
        // The number wraps after days of work; a worker that slept all the while misses one job, which is allowed.
        shared.state.0.store(closed.wrapping_add(State::NEXT_JOB) | State::OPEN, Ordering::SeqCst);
        for (parked, worker) in shared.parked.iter().zip(&self.workers).take(helpers) {
            if parked.load(Ordering::SeqCst) && parked.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            while let Some(chunk) = shared.take(chunks) {
                task(0, chunk);
            }
        }));
        if outcome.is_err() {
            shared.next.0.store(chunks, Ordering::Relaxed);
        }
        shared.close();
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Err(panic) = outcome {
            resume_unwind(panic);
        }
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // Its panics were caught and passed on.
            drop(worker.join());
        }
    }
}

impl Shared {
    /// The next chunk, if one is left.
    fn take(&self, chunks: usize) -> Option<usize> {
        // The counter runs past the end by one for each thread: looking first keeps it far from wrapping.
        let chunk = self.next.0.fetch_add(1, Ordering::Relaxed);
        (chunk < chunks).then_some(chunk)
    }

    /// Lets no one in any more, and waits for those inside.
    fn close(&self) {
        let mut inside = self.state.0.fetch_and(!State::OPEN, Ordering::AcqRel) & State::INSIDE;
        for _ in 0..CALLER_SPINS {
            if inside == 0 {
                return;
            }
            std::hint::spin_loop();
            inside = self.state.0.load(Ordering::Acquire) & State::INSIDE;
        }
        *self.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::current());
        loop {
            self.caller_parked.store(true, Ordering::SeqCst);
            if self.state.0.load(Ordering::SeqCst) & State::INSIDE == 0 {
                break;
            }
            std::thread::park();
        }
        self.caller_parked.store(false, Ordering::SeqCst);
    }

    /// A worker's life.
    fn work(&self, worker: usize) {
        let mut seen = 0;
        let mut since = Instant::now();
        while let Some(job) = self.enter(worker, seen) {
            seen = job;
            // SAFETY: inside, where the caller doesn't write it.
            let job = unsafe { &*self.job.get() };
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                while let Some(chunk) = self.take(job.chunks) {
                    // SAFETY: `run_indexed` doesn't return before this worker has left.
                    unsafe { (job.call)(job.task, worker + 1, chunk) };
                }
            }));
            if let Err(panic) = outcome {
                self.next.0.store(job.chunks, Ordering::Relaxed);
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
            let before = self.state.0.fetch_sub(1, Ordering::SeqCst);
            if before & (State::OPEN | State::INSIDE) == 1 && self.caller_parked.swap(false, Ordering::SeqCst) {
                let caller = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
                caller.iter().for_each(Thread::unpark);
            }
            if since.elapsed() > TURN {
                std::thread::yield_now();
                since = Instant::now();
            }
        }
    }

    /// Waits for a job other than `seen` and enters it; `None`: there will be no more.
    fn enter(&self, worker: usize, seen: u64) -> Option<u64> {
        let mut spins = 0;
        loop {
            let state = self.state.0.load(Ordering::SeqCst);
            if state & State::OPEN != 0 && State::job(state) != seen {
                let entered = self.state.0.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed);
                if entered.is_ok() {
                    self.parked[worker].store(false, Ordering::Relaxed);
                    return Some(State::job(state));
                }
                continue;
            }
            if self.ends.load(Ordering::SeqCst) {
                return None;
            }
            if spins < WORKER_SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else if !self.parked[worker].swap(true, Ordering::SeqCst) {
                // Said that it parks: look once more before doing so.
                continue;
            } else {
                std::thread::park();
                spins = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn every_chunk_is_done_once_whatever_the_threads_and_the_chunks() {
        for threads in [1, 2, 3, 8] {
            let mut pool = Threads::new(threads).unwrap();
            for chunks in (0..40).chain([1000]) {
                let done: Vec<AtomicU32> = (0..chunks).map(|_| AtomicU32::new(0)).collect();
                pool.run(chunks, |chunk| _ = done[chunk].fetch_add(1, Ordering::Relaxed));
                assert!(
                    done.iter().all(|done| done.load(Ordering::Relaxed) == 1),
                    "{chunks} chunks, {threads} threads"
                );
            }
        }
    }

    #[test]
    fn many_short_jobs_in_a_row_leave_no_one_behind() {
        let mut pool = Threads::new(4).unwrap();
        let sum = AtomicUsize::new(0);
        for job in 0..30_000 {
            pool.run(3, |chunk| _ = sum.fetch_add(chunk + job % 2, Ordering::Relaxed));
            // Now and then long enough for the workers to park.
            if job % 5000 == 0 {
                std::thread::yield_now();
                (0..100_000).for_each(|_| std::hint::spin_loop());
            }
        }
        assert_eq!(sum.into_inner(), 30_000 * 3 + 15_000 * 3);
    }

    #[test]
    fn each_thread_has_its_own_scratch() {
        let mut pool = Threads::new(3).unwrap();
        let mut scratch = vec![0_usize; 3];
        pool.run_with(&mut scratch, 500, |sum, chunk| *sum += chunk);
        assert_eq!(scratch.iter().sum::<usize>(), 499 * 500 / 2);
    }

    #[test]
    fn every_row_is_visited_once_and_by_its_number() {
        let mut pool = Threads::new(3).unwrap();
        for rows in [0, 1, 8, 9, 100] {
            let mut values = vec![0; rows * 3];
            pool.for_rows(&mut values, 3, |row, values| values.iter_mut().for_each(|value| *value += row + 1));
            assert!(values.iter().enumerate().all(|(index, value)| *value == index / 3 + 1), "{rows} rows");
        }
    }

    #[test]
    fn a_panic_in_any_thread_reaches_the_caller_and_the_next_job_runs() {
        let mut pool = Threads::new(3).unwrap();
        for culprit in [0, 7, 99] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, |chunk| assert_ne!(chunk, culprit, "the culprit"));
            }));
            let panic = *outcome.unwrap_err().downcast::<String>().unwrap();
            assert!(panic.contains("the culprit"), "{panic}");
        }
        let done = AtomicUsize::new(0);
        pool.run(100, |_| _ = done.fetch_add(1, Ordering::Relaxed));
        assert_eq!(done.into_inner(), 100);
    }
}
