//! Budgets and caps are kept, and the rest of a budget is too small for any further step.

use super::*;
use proptest::prelude::*;

/// Matrices of one rank each, and tables in groups.
fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
    prop::collection::vec(prop_oneof![matrix(), table()], 1..6)
}

fn table() -> impl Strategy<Value = Candidate> {
    (2..8_usize, prop::collection::vec((0..20_usize, 0.0..9.0_f64, 0.1..3.0_f64), 2..4)).prop_map(
        |(columns, groups)| {
            let sizes: Vec<usize> = groups.iter().map(|(more, ..)| columns + 1 + more).collect();
            let of =
                |&(_, size, decay): &(usize, f64, f64)| (0..columns).map(move |k| size * (-decay * k as f64).exp());
            Candidate {
                rows: sizes.iter().sum(),
                columns,
                usage: Usage::TiedLookup,
                energies: groups.iter().flat_map(of).collect(),
                groups: sizes,
            }
        },
    )
}

fn matrix() -> impl Strategy<Value = Candidate> {
    (2..40_usize, 2..40_usize, 0..3_usize, 0.1..3.0_f64, 0.0..9.0_f64).prop_map(
        |(rows, columns, usage, decay, size)| {
            let energies = (0..rows.min(columns)).map(|k| size * (-decay * k as f64).exp()).collect();
            let usage = [Usage::Map, Usage::Lookup, Usage::TiedLookup][usage];
            Candidate { rows, columns, usage, energies, groups: Vec::new() }
        },
    )
}

fn least(candidates: &[Candidate]) -> usize {
    candidates.iter().map(|each| Curve::new(each, Weighting::Absolute).unwrap().points[0].parameters).sum()
}

proptest! {
    #[test]
    fn a_budget_is_kept_and_what_is_left_buys_nothing_more(
        candidates in candidates(), share in 0.0..1.0_f64, relative in any::<bool>(),
    ) {
        let weighting = if relative { Weighting::Relative } else { Weighting::Absolute };
        let dense: usize = candidates.iter().map(|each| each.rows * each.columns).sum();
        let most = least(&candidates) + ((dense - least(&candidates)) as f64 * share) as usize;
        let choices = allocate(&candidates, weighting, Target::Parameters(most), None).unwrap();
        let spent: usize = choices.iter().map(|choice| choice.parameters).sum();
        prop_assert!(spent <= most);
        for (candidate, choice) in candidates.iter().zip(&choices) {
            let curve = Curve::new(candidate, weighting).unwrap();
            let next = curve.points.iter().find(|point| point.parameters > choice.parameters);
            // A curve without further loss may stay at its point.
            if let Some(next) = next {
                prop_assert!(spent + next.parameters - choice.parameters > most);
            }
        }
        prop_assert_eq!(&choices, &allocate(&candidates, weighting, Target::Parameters(most), None).unwrap());
    }

    #[test]
    fn a_cap_on_macs_is_kept_beside_the_budget(
        candidates in candidates(), budget in 0.0..1.0_f64, cap in 0.0..1.2_f64, relative in any::<bool>(),
    ) {
        let weighting = if relative { Weighting::Relative } else { Weighting::Absolute };
        let dense: usize = candidates.iter().map(|each| each.rows * each.columns).sum();
        let most = least(&candidates) + ((dense - least(&candidates)) as f64 * budget) as usize;
        let macs = |choices: &[Choice]| choices.iter().map(|choice| choice.macs).sum::<usize>();
        let free = allocate(&candidates, weighting, Target::Parameters(most), None).unwrap();
        let cap = (cap * macs(&free) as f64) as usize;
        let curves: Vec<_> = candidates.iter().map(|each| Curve::new(each, weighting).unwrap()).collect();
        let fewest: usize = curves.iter().map(|curve| curve.points[0].macs).sum();
        match allocate(&candidates, weighting, Target::Parameters(most), Some(cap)) {
            Ok(capped) => {
                let spent: usize = capped.iter().map(|choice| choice.parameters).sum();
                prop_assert!(macs(&capped) <= cap && spent <= most);
                for (candidate, choice) in candidates.iter().zip(&capped) {
                    let (m, n) = (candidate.rows, candidate.columns);
                    let exact = choice.spec().map_or(candidate.dense_macs(), |spec| {
                        spec.macs(m, n, candidate.usage).unwrap()
                    });
                    prop_assert_eq!(exact, choice.macs);
                }
                // A cap far from every step changes nothing.
                let roomy = curves.iter().flat_map(|curve| &curve.points).map(|point| point.macs).sum();
                prop_assert_eq!(&free, &allocate(&candidates, weighting, Target::Parameters(most), Some(roomy)).unwrap());
            }
            Err(error) => {
                prop_assert!(cap < fewest && error.to_string().contains(&format!("takes {fewest};")), "{error}");
            }
        }
    }

    #[test]
    fn no_exchange_of_single_ranks_between_two_matrices_does_better(seed in 0..1000_u64) {
        // Two curves of equal shape, so that every exchange of ranks is feasible.
        let energies = |start: u64| (0..12).map(|k| ((start + 3) as f64 / (k + 1) as f64).powi(2)).collect();
        let pair = [1, 7].map(|start| Candidate { rows: 12, columns: 12, usage: Usage::Map, energies: energies(start * seed % 11), groups: Vec::new() });
        let choices = allocate(&pair, Weighting::Absolute, Target::Parameters(150), None).unwrap();
        let loss = |ranks: [usize; 2]| -> f64 {
            pair.iter().zip(ranks).map(|(each, rank)| each.energies[rank..].iter().sum::<f64>()).sum()
        };
        let size = |rank: usize| rank * (24 - rank);
        let ranks = [0, 1].map(|i| match choices[i].term { Some(TermSpec::LowRank { rank }) => rank, _ => 12 });
        for first in 1..12 {
            for second in 1..12 {
                if size(first) + size(second) <= size(ranks[0]) + size(ranks[1]) {
                    // Optimal except for the last step of one matrix.
                    let slack = pair.iter().flat_map(|each| &each.energies[1..]).fold(0.0_f64, |a, &b| a.max(b));
                    prop_assert!(loss(ranks) <= loss([first, second]) + slack);
                }
            }
        }
    }

    #[test]
    fn a_table_s_ranks_are_the_best_for_its_parameters(table in table(), at in 0.0..1.0_f64) {
        let curve = Curve::new(&table, Weighting::Absolute).unwrap();
        let corners = curve.steps(0);
        let corner = &curve.points[corners[((corners.len() - 1) as f64 * at) as usize].to];
        // No ranks of the groups with as many parameters lose less than a corner of the hull.
        let loss = |ranks: &[usize]| -> f64 {
            table.energies.chunks(table.columns).zip(ranks).map(|(all, &rank)| all[rank..].iter().sum::<f64>()).sum()
        };
        let mut ranks = vec![1; table.groups.len()];
        loop {
            let parameters = table.term(&ranks).parameters(table.rows, table.columns).unwrap();
            prop_assert!(parameters > corner.parameters || loss(&ranks) >= corner.lost - 1e-9, "{:?}", ranks);
            let Some(g) = (0..ranks.len()).find(|&g| ranks[g] + 1 < table.columns) else { break };
            ranks[g] += 1;
            ranks[..g].fill(1);
        }
    }

    #[test]
    fn a_target_of_lost_energy_is_met(candidates in candidates(), share in 0.0..1.0_f64) {
        let choices = allocate(&candidates, Weighting::Relative, Target::LostEnergy(share), None).unwrap();
        let (mut lost, mut total) = (0.0, 0.0);
        for (candidate, choice) in candidates.iter().zip(&choices) {
            let curve = Curve::new(candidate, Weighting::Relative).unwrap();
            total += curve.total;
            lost += choice.lost_energy * curve.total;
        }
        prop_assert!(lost <= share * total + 1e-9);
    }
}

#[test]
fn too_small_a_budget_says_what_would_do() {
    let one = Candidate { rows: 8, columns: 8, usage: Usage::Map, energies: vec![1.0; 8], groups: Vec::new() };
    let pair = [one.clone(), one];
    let spend = |target, cap| allocate(&pair, Weighting::Absolute, target, cap);
    let refused = |target, cap, words: &str| {
        let error = spend(target, cap).unwrap_err();
        assert!(matches!(error, Error::Config(_)) && error.to_string().contains(words), "{error}");
    };
    refused(Target::Parameters(29), None, "need 30");
    refused(Target::LostEnergy(1.5), None, "from 0 to 1");
    refused(
        Target::Parameters(100),
        Some(29),
        "rank 1 of every matrix takes 30; the dense matrices take 128, so that a share of 0.2344",
    );
    refused(Target::LostEnergy(0.125), Some(100), "a lost energy of 0.125 takes 128;");
    assert!(spend(Target::LostEnergy(0.125), Some(128)).is_ok());
    let looked_up = pair.clone().map(|each| Candidate { usage: Usage::Lookup, ..each });
    let error = allocate(&looked_up, Weighting::Absolute, Target::Parameters(100), Some(0)).unwrap_err();
    assert!(error.to_string().ends_with("takes 16; the dense matrices take none"), "{error}");
}
