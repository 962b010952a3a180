/// From the project's NumPy reference, `fit` on the rows of [`rows`] and [`queries`].
const FIXTURES: &[Fixture] = &[
    Fixture { d: 64, t: 512, query: true, gram: [5.357516e-01, 6.433504e-01, 1.636304e+00, -3.046644e-02, -2.064301e-02], kappa: 1.407151e+00 },
    Fixture { d: 64, t: 16, query: true, gram: [7.703254e-01, 7.874443e-01, 1.305824e+00, -2.750281e-02, 2.236596e-02], kappa: 8.847664e-01 },
    Fixture { d: 64, t: 512, query: false, gram: [1.117902e+00, 1.104001e+00, 1.078990e+00, -5.991786e-02, -3.519281e-02], kappa: 1.616373e+00 },
    Fixture { d: 80, t: 512, query: true, gram: [4.507094e-01, 5.924490e-01, 1.447005e+00, -1.247101e-02, 2.475513e-02], kappa: 1.367447e+00 },
];
