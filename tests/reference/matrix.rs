//! Matrix products in double precision, on all CPUs.

use std::sync::atomic::{AtomicUsize, Ordering};

use forebay::model::{Tensor, quant};

/// The results of `job(0)`, `job(1)`, … worked out on all CPUs, in order.
pub fn in_parallel<T: Send>(jobs: usize, job: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(jobs.max(1));
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            // The counter only hands out numbers; results travel through the join.
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= jobs {
                return done;
            }
            done.push((at, job(at)));
        }
    };
    let mut done: Vec<(usize, T)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("no panic")).collect()
    });
    done.sort_by_key(|&(at, _)| at);
    done.into_iter().map(|(_, result)| result).collect()
}

/// Input rows worked on together, side by side so that the inner loop runs over them: 64 of 576
/// values are 300 KB, which stay in a core's cache.
const LANES: usize = 64;
/// Weight rows of one job.
const JOB_ROWS: usize = 192;

/// `inputs` (rows of the tensor's column count) times the transposed tensor: for each input row
/// its products with all weight rows.
pub fn times_rows(weights: &Tensor<'_>, inputs: &[f64]) -> Vec<f64> {
    let (columns, rows) = (weights.columns(), weights.rows());
    let panels: Vec<Vec<f64>> =
        inputs.chunks(LANES * columns).map(|rows| transposed(rows, columns)).collect();
    let groups = rows.div_ceil(JOB_ROWS);
    let parts = in_parallel(panels.len() * groups, |job| {
        let first = job % groups * JOB_ROWS;
        products(weights, first..rows.min(first + JOB_ROWS), &panels[job / groups])
    });
    let mut output = vec![0.0; inputs.len() / columns * rows];
    for (job, part) in parts.iter().enumerate() {
        let (first_input, first_row) = (job / groups * LANES, job % groups * JOB_ROWS);
        let lanes = panels[job / groups].len() / columns;
        for (row, products) in part.chunks_exact(lanes).enumerate() {
            for (lane, product) in products.iter().enumerate() {
                output[(first_input + lane) * rows + first_row + row] = *product;
            }
        }
    }
    output
}

/// Rows of `columns` values to columns: value k of all rows side by side.
fn transposed(rows: &[f64], columns: usize) -> Vec<f64> {
    let count = rows.len() / columns;
    let mut panel = vec![0.0; rows.len()];
    for (lane, row) in rows.chunks_exact(columns).enumerate() {
        row.iter().enumerate().for_each(|(k, value)| panel[k * count + lane] = *value);
    }
    panel
}

/// The products of some weight rows with the inputs of a panel, weight row after weight row.
fn products(weights: &Tensor<'_>, rows: std::ops::Range<usize>, panel: &[f64]) -> Vec<f64> {
    let columns = weights.columns();
    let lanes = panel.len() / columns;
    let mut output = vec![0.0; rows.len() * lanes];
    let mut values = vec![0.0f32; columns];
    for (row, sums) in rows.zip(output.chunks_exact_mut(lanes)) {
        quant::dequantize_row(weights.dtype, weights.row(row), &mut values);
        add_products(&values, panel, sums);
    }
    output
}

/// Adds to each sum the products of `weights` with its column of the panel.
fn add_products(weights: &[f32], panel: &[f64], sums: &mut [f64]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the function's one requirement, AVX2, was just checked. The plain build may not
        // use it, and takes twice as long.
        return unsafe { add_products_avx2(weights, panel, sums) };
    }
    add_products_plain(weights, panel, sums);
}

/// The same code, which the compiler may turn into AVX2 here. No sum changes: multiplications and
/// additions are not fused.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn add_products_avx2(weights: &[f32], panel: &[f64], sums: &mut [f64]) {
    add_products_plain(weights, panel, sums);
}

#[inline(always)]
fn add_products_plain(weights: &[f32], panel: &[f64], sums: &mut [f64]) {
    let lanes = sums.len();
    let (fours, rest) = weights.as_chunks::<4>();
    let (panel, panel_rest) = panel.split_at(4 * fours.len() * lanes);
    // Four at a time, so that each sum is loaded and stored once for four products.
    for (w, x) in fours.iter().zip(panel.chunks_exact(4 * lanes)) {
        let (w, (a, x)) = (w.map(f64::from), x.split_at(lanes));
        let (b, x) = x.split_at(lanes);
        let (c, d) = x.split_at(lanes);
        for ((((sum, a), b), c), d) in sums.iter_mut().zip(a).zip(b).zip(c).zip(d) {
            *sum += (w[0] * a + w[1] * b) + (w[2] * c + w[3] * d);
        }
    }
    for (&w, x) in rest.iter().zip(panel_rest.chunks_exact(lanes)) {
        sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += f64::from(w) * x);
    }
}
