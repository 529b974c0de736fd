//! Are more threads ever slower than one, on cores that others keep busy?
//!
//! A thread that waits by spinning for another that is not scheduled waits for whole time slices. So as many threads as the
//! machine has cores count to no end, and the model runs beside them, on one thread and on several in turn.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use serde_json::Value;

use super::shapes::Shape;
use crate::process;

/// Processes of each number of threads. All of them count, not the fastest: what the others take is what is measured.
const ROUNDS: usize = 3;
const REPEAT: &str = "2";

/// What a shape took in all, in seconds.
pub struct Row {
    pub shape: Shape,
    pub alone_s: f64,
    pub together_s: f64,
}

/// Runs the model on one thread and on `threads`, beside busy threads.
pub fn measure(file: &Path, threads: usize) -> anyhow::Result<Vec<Row>> {
    let cores = std::thread::available_parallelism().context("the number of cores is unknown")?.get();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let rows = measure_beside(file, threads);
        over.store(true, Ordering::Relaxed);
        rows
    })
}

fn measure_beside(file: &Path, threads: usize) -> anyhow::Result<Vec<Row>> {
    let shapes = [Shape::PREFILL, Shape::DECODE_ALONE, Shape::DECODE_BATCH];
    let mut rows: Vec<Row> = shapes.map(|shape| Row { shape, alone_s: 0.0, together_s: 0.0 }).into();
    for _ in 0..ROUNDS {
        let [alone, together] = [1, threads].map(|threads| seconds(file, threads, &shapes));
        for ((row, alone_s), together_s) in rows.iter_mut().zip(alone?).zip(together?) {
            row.alone_s += alone_s;
            row.together_s += together_s;
        }
    }
    Ok(rows)
}

/// Of each shape, all measurements of one process.
fn seconds(file: &Path, threads: usize, shapes: &[Shape]) -> anyhow::Result<Vec<f64>> {
    let mut command = Command::new(std::env::current_exe().context("this program's own path is unknown")?);
    command.arg("step").arg("--model").arg(file).args(["--threads", &threads.to_string(), "--repeat", REPEAT]);
    command.args(shapes.iter().map(Shape::to_string));
    let (output, _) = process::run(&mut command)?;
    let measured: Vec<Value> = serde_json::from_str(&output)?;
    let sum = |one: &Value| Some(one["seconds"].as_array()?.iter().filter_map(Value::as_f64).sum());
    measured.iter().map(|one| sum(one).context("no `seconds`")).collect()
}
